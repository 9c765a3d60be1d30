"""Gradient descent on what codes of keys decode to: levels, means, and the vectors that coordinates stand for.

Which code a key gets is decided as ever, by the nearest level; gradients pass through what the code decodes to. The
loss is the KL divergence of attention weights over queries and keys that were captured, one layer at a time. What comes
out is scored on rows that the descent did not see, and the start is kept where it is not beaten there.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from jaxquant.calibrate.statistics import Statistics
from jaxquant.mixed import Mixed

Progress = Callable[[int, int], object]
Changes = PyTree[Array]

_CHECKS = 10  # times that a descent is scored on what it did not see


def attention(
    keys: Sequence[Mixed],
    found: Statistics,
    *,
    scale: float,
    steps: int = 100,
    rate: float = 3e-3,
    progress: Progress | None = None,
) -> tuple[tuple[Mixed, ...], Float[np.ndarray, "layers 2"]]:
    """Descend on the KL divergence of attention weights, over captured queries and keys, layer by layer.

    Args:
        keys: quantizer of each layer.
        found: statistics with samples of queries and keys; every fourth row, the last among them, is held out.
        scale: of the scores before the softmax.
        steps: of the descent; each sees one row.
        rate: of the steps, in units of a level or of a coordinate's length.
        progress: called with the layers done and all layers.

    Returns:
        The quantizers, and for each layer the loss on the rows held out, before and after.

    Raises:
        ValueError: there are fewer than 2 rows.
    """
    rows, out, losses = found.rows, [], []
    if rows < 2:
        raise ValueError(f"found must be of at least 2 rows, one to descend on and one to judge by, got {rows}")
    each = found.key_samples.shape[2] // rows
    q, k = (np.stack(np.split(x[:, :, : rows * each], rows, axis=2)) for x in (found.query_samples, found.key_samples))
    for layer, start in enumerate(keys):
        data = [(jnp.asarray(q[row, layer]), jnp.asarray(k[row, layer])) for row in range(rows)]

        def loss(changes: Changes, row: tuple[Array, Array], start: Mixed = start) -> Array:
            return _attention_loss(_changed(start, changes), *row, scale)

        best, before, after = descend(loss, _zeros(start), data, steps=steps, rate=rate)
        out.append(_changed(start, best))
        losses.append((before, after))
        if progress is not None:
            progress(layer + 1, len(keys))
    return tuple(out), np.array(losses)


def descend(
    loss: Callable[[Changes, Any], Array],
    start: Changes,
    data: Sequence[Any],
    *,
    steps: int,
    rate: float,
    progress: Progress | None = None,
) -> tuple[Changes, float, float]:
    """Run Adam over data, one item a step, and return the best of what it passes, the start among it.

    Every fourth item, the last among them, is held out, and says what is best.

    Example:
        >>> data = [jnp.float32(x) for x in (1, 3, 2, 2)]
        >>> best, before, after = descend(lambda x, item: (x - item) ** 2, jnp.float32(0), data, steps=60, rate=0.2)
        >>> before, after < 0.1
        (4.0, True)
    """
    unseen = range(len(data) - 1, -1, -4)
    seen = [i for i in range(len(data)) if i not in unseen]
    schedule = optax.cosine_decay_schedule(rate, max(1, steps))
    optimizer = optax.adam(schedule)
    run = jax.jit(loss)

    @jax.jit
    def step(changes: Changes, state: Any, item: Any) -> tuple[Changes, Any]:
        gradient = jax.grad(loss)(changes, item)
        with jax.numpy_dtype_promotion("standard"):  # which optax counts on
            updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(changes, updates), state

    def score(changes: Changes) -> float:
        return float(np.mean([run(changes, data[i]) for i in unseen]))

    best, before = start, score(start)
    changes, state, least = start, optimizer.init(start), before
    for number in range(1, steps + 1):
        changes, state = step(changes, state, data[seen[number % len(seen)]])
        if number % max(1, steps // _CHECKS) == 0 or number == steps:
            found = score(changes)
            if found < least:
                best, least = changes, found
        if progress is not None:
            progress(number, steps)
    return best, before, least


def _zeros(half: Mixed) -> dict[str, Any]:
    assert half.synthesis is not None
    return {
        "levels": [jnp.zeros_like(table) for table in half.levels],
        "mean": jnp.zeros_like(half.mean),
        "synthesis": jnp.zeros_like(half.synthesis),
    }


def _changed(half: Mixed, changes: dict[str, Any]) -> Mixed:
    """Apply changes, which are in units of a level and of the length of a coordinate's vector."""
    assert half.synthesis is not None
    length = jnp.sqrt(jnp.mean(half.synthesis**2, axis=-1, keepdims=True))
    return dataclasses.replace(
        half,
        levels=tuple(jnp.sort(a + b, axis=-1) for a, b in zip(half.levels, changes["levels"], strict=True)),
        mean=half.mean + jnp.mean(length, axis=-2) * changes["mean"],
        synthesis=half.synthesis + length * changes["synthesis"],
    )


def _attention_loss(
    keys: Mixed, q: Float[Array, "kv_heads tokens group dim"], k: Float[Array, "kv_heads tokens dim"], scale: float
) -> Float[Array, ""]:
    places = jnp.arange(k.shape[1], dtype=jnp.int32)
    visible = (places[None, :] <= places[:, None])[None, :, None]
    logs = []
    for x in (k, keys.restore(keys.expand(keys.quantize(k)))):
        scores = jnp.einsum("htgd,hsd->htgs", q, x, precision="highest") * scale
        logs.append(jax.nn.log_softmax(jnp.where(visible, scores, jnp.finfo(jnp.float32).min), axis=-1))
    return jnp.mean(jnp.sum(jnp.exp(logs[0]) * (logs[0] - logs[1]), axis=-1))
