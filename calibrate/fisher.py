"""How much the model's predictions change with an error of a key or value: the Fisher information of the cache.

Zeros are added to every key and value, and the log-likelihood of labels is differentiated with respect to them. With
labels drawn from the model's own predictions, F = E[g g^T] is the Hessian of the KL divergence, so that independent
errors of covariance C add `tr(F C) / 2` nats a token and kv head: the same unit for keys, values, layers and heads.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from jaxquant.models.decoder import Decoder

Progress = Callable[[int, int], object]
Labels = Literal["model", "text"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fisher:
    """Second moments of the gradients of a row's log-likelihood with respect to one of its keys or values.

    Attributes:
        keys: mean over tokens of g g^T, [layers, kv_heads, dim, dim]; the diagonal is the information of each channel.
        values: likewise.
        tokens: of text.
    """

    keys: Float[np.ndarray, "layers kv_heads dim dim"]
    values: Float[np.ndarray, "layers kv_heads dim dim"]
    tokens: int

    def __add__(self, other: "Fisher") -> "Fisher":
        """Join the information of different text."""
        tokens = self.tokens + other.tokens
        joined = (
            (mine * self.tokens + theirs * other.tokens) / tokens
            for mine, theirs in ((self.keys, other.keys), (self.values, other.values))
        )
        return Fisher(**dict(zip(("keys", "values"), joined, strict=True)), tokens=tokens)


def collect(
    key: PRNGKeyArray,
    decoder: Decoder,
    tokens: Int[np.ndarray, "rows tokens"],
    *,
    labels: Labels = "model",
    temperature: float = 1.0,
    first: int = 0,
    progress: Progress | None = None,
) -> Fisher:
    """Measure the information, one row at a time.

    Args:
        key: of the labels.
        decoder: the network.
        tokens: rows of token ids, each a text of its own.
        labels: drawn from the model's predictions, which gives the curvature of the KL divergence, or the next tokens
            of the text (the empirical information).
        temperature: divides the logits. Above 1, predictions that are certain still count: an error that would flip
            them is large, and at temperature 1 its first steps cost nothing.
        first: number of the first row, where rows of one measurement come in parts: each row has labels of its own.
        progress: called with the rows done and all rows.

    Raises:
        ValueError: an argument is not one of those listed.

    Example:
        >>> from jaxquant import models
        >>> model = models.load()
        >>> ids = np.array([model.tokenizer.encode("import numpy as np")])
        >>> collect(jax.random.key(0), model.decoder, ids).values.shape
        (5, 2, 64, 64)
    """
    if labels not in ("model", "text"):
        raise ValueError(f"labels must be model or text, got {labels!r}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    rows, length = tokens.shape
    if not rows or length < 2:
        raise ValueError(f"tokens must have at least one row of 2 tokens, got shape {[rows, length]}")
    graph, state = nnx.split(decoder)
    total: Fisher | None = None
    for row in range(rows):
        some = jnp.asarray(tokens[row], jnp.int32)
        found = _row(
            graph, state, jax.random.fold_in(key, first + row), some, jnp.float32(temperature), labels == "text"
        )
        new = Fisher(**{name: np.asarray(x, np.float64) for name, x in found.items()}, tokens=length)
        total = new if total is None else total + new
        if progress is not None:
            progress(row + 1, rows)
    assert total is not None
    return total


def loss(
    decoder: Decoder,
    tokens: Int[Array, " tokens"],
    labels: Int[Array, " tokens"] | None,
    key: PRNGKeyArray,
    temperature: float | Float[Array, ""],
    changes: tuple[Float[Array, "layers tokens kv_heads dim"], Float[Array, "layers tokens kv_heads dim"]],
) -> Float[Array, ""]:
    """Give the negative log-likelihood of a row's labels, summed, with changes added to its keys and values.

    Labels are drawn from the predictions where they are None; -1 marks a position that does not count.
    """

    def tap(layer: int, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        return q, k + changes[0][layer].astype(k.dtype), v + changes[1][layer].astype(v.dtype)

    logits = decoder(tokens[None], tap=tap, recompute=True)[0][0] / temperature
    if labels is None:
        labels = lax.stop_gradient(jax.random.categorical(key, logits))
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(labels, 0)[:, None], axis=-1)[:, 0]
    return -jnp.sum(jnp.where(labels >= 0, picked, 0.0))


def _row(
    graph: nnx.GraphDef,
    state: PyTree[Array],
    key: PRNGKeyArray,
    tokens: Int[Array, " tokens"],
    temperature: Float[Array, ""],
    from_text: bool,
) -> dict[str, Array]:
    decoder: Decoder = nnx.merge(graph, state)
    a = decoder.architecture
    labels = jnp.append(tokens[1:], -1) if from_text else None
    zeros = jnp.zeros((a.layers, tokens.shape[0], a.kv_heads, a.dim), jnp.float32)
    gradients = jax.grad(lambda changes: loss(decoder, tokens, labels, key, temperature, changes))((zeros, zeros))
    moments = [jnp.einsum("lthd,lthe->lhde", g, g, precision="highest") / tokens.shape[0] for g in gradients]
    return {"keys": moments[0], "values": moments[1]}


_row = jax.jit(_row, static_argnums=(0, 5))
