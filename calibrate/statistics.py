"""What attention reads in a model, summed up over text: means, second moments, attention weights, and a few samples.

`collect` runs rows of tokens through a decoder one after another inside one compiled step, so that the sums do not
depend on how rows are batched, and adds them up in float64.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from jaxquant.models.decoder import Decoder

Progress = Callable[[int, int], object]

_QUERIES = 256  # scored at a time
_FIRST = 16  # positions whose attention is reported one by one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    """Sums over rows of text, for each layer and kv head; queries are those of all heads that read the kv head.

    Second moments are about 0. The importance of a query for keys is `sum_t p_t**2 |W (v_t - o)|**2`: what a unit error
    of all its scores adds to the squared error of the layer's output, W its head's rows of the output projection. The
    importance of a token for values is the sum of `p**2` over the queries that see it.

    Attributes:
        rows: of text.
        tokens: of text.
        keys: sum of keys, [layers, kv_heads, dim].
        values: sum of values.
        key_moments: sum of k k^T, [layers, kv_heads, dim, dim].
        value_moments: sum of v v^T.
        query_moments: sum of q q^T.
        weighted_queries: sum of q q^T times the query's importance and the scores' scale squared: what errors of keys
            cost in the layer's output.
        weighted_values: sum of v v^T times the token's importance.
        weighted_outputs: sum of W^T W times the tokens' importance: what errors of values cost in the layer's output.
        importance: sum of the tokens' importance, [layers, kv_heads].
        attention: weight that the first tokens of a row receive, summed over queries, [layers, kv_heads, positions].
        key_samples: some keys, [layers, kv_heads, samples, dim], float32.
        value_samples: some values, likewise.
        query_samples: queries of the same tokens, those of all heads that read the kv head side by side,
            [layers, kv_heads, samples, group, dim].
    """

    rows: int
    tokens: int
    keys: Float[np.ndarray, "layers kv_heads dim"]
    values: Float[np.ndarray, "layers kv_heads dim"]
    key_moments: Float[np.ndarray, "layers kv_heads dim dim"]
    value_moments: Float[np.ndarray, "layers kv_heads dim dim"]
    query_moments: Float[np.ndarray, "layers kv_heads dim dim"]
    weighted_queries: Float[np.ndarray, "layers kv_heads dim dim"]
    weighted_values: Float[np.ndarray, "layers kv_heads dim dim"]
    weighted_outputs: Float[np.ndarray, "layers kv_heads dim dim"]
    importance: Float[np.ndarray, "layers kv_heads"]
    attention: Float[np.ndarray, "layers kv_heads positions"]
    key_samples: Float[np.ndarray, "layers kv_heads samples dim"]
    value_samples: Float[np.ndarray, "layers kv_heads samples dim"]
    query_samples: Float[np.ndarray, "layers kv_heads samples group dim"]

    def __add__(self, other: "Statistics") -> "Statistics":
        """Join statistics of different text; the samples are put side by side."""
        joined = {}
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if field.name.endswith("_samples"):
                joined[field.name] = np.concatenate([mine, theirs], axis=2)
            else:
                joined[field.name] = mine + theirs
        return Statistics(**joined)

    @property
    def key_covariance(self) -> Float[np.ndarray, "layers kv_heads dim dim"]:
        """Covariance of the keys."""
        return _covariance(self.key_moments, self.keys, self.tokens)

    @property
    def value_covariance(self) -> Float[np.ndarray, "layers kv_heads dim dim"]:
        """Covariance of the values."""
        return _covariance(self.value_moments, self.values, self.tokens)


def collect(
    decoder: Decoder,
    tokens: Int[np.ndarray, "rows tokens"],
    *,
    batch: int = 4,
    samples: int = 4096,
    start: Statistics | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """Sum up what attention reads over rows of tokens.

    Args:
        decoder: the network.
        tokens: rows of token ids, each a text of its own.
        batch: rows of a compiled step; with more than one device, a multiple of their number is spread over them.
        samples: tokens whose keys, values and queries are kept, at regular distances, for the fit of codebooks.
        start: statistics of text that came before.
        progress: called with the rows done and all rows.

    Raises:
        ValueError: there are no rows, or a size is out of range.

    Example:
        >>> from jaxquant import models
        >>> model = models.load()
        >>> ids = np.array([model.tokenizer.encode("import numpy as np")])
        >>> collect(model.decoder, ids).query_moments.shape == (model.architecture.layers, 2, 64, 64)
        True
    """
    rows, length = tokens.shape
    if not rows or length < 2:
        raise ValueError(f"tokens must have at least one row of 2 tokens, got shape {[rows, length]}")
    if batch < 1 or samples < 1:
        raise ValueError(f"batch and samples must be at least 1, got {batch} and {samples}")
    graph, state = nnx.split(decoder)
    step = max(1, rows * length // samples)
    devices = jax.devices()
    spread = len(devices) > 1 and batch % len(devices) == 0
    total = start
    for first in range(0, rows, batch):
        some = jnp.asarray(tokens[first : first + batch], jnp.int32)
        if spread and len(some) == batch:
            mesh = jax.make_mesh((len(devices),), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
            some = jax.device_put(some, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows")))
            sums = _spread(graph, state, some, step, mesh)
        else:
            sums = _step(graph, state, some, step)
        for row in range(len(some)):
            part = {
                name: np.asarray(values[row], np.float32 if name.endswith("samples") else np.float64)
                for name, values in sums.items()
            }
            new = Statistics(rows=1, tokens=length, **part)
            total = new if total is None else total + new
        if progress is not None:
            progress(first + len(some), rows)
    assert total is not None
    return total


def _rows(graph: nnx.GraphDef, state: PyTree[Array], tokens: Int[Array, "rows tokens"], step: int) -> dict[str, Array]:
    decoder: Decoder = nnx.merge(graph, state)
    a = decoder.architecture

    def one(row: Int[Array, " tokens"]) -> dict[str, Array]:
        parts: list[dict[str, Array]] = []

        def tap(layer: int, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
            output = decoder.layers[layer].self_attn.o_proj.kernel[...].astype(jnp.float32)
            output = output.reshape(a.kv_heads, a.heads // a.kv_heads, a.dim, a.hidden)
            heads = [jnp.swapaxes(x[0].astype(jnp.float32), 0, 1) for x in (q, k, v)]
            grouped = heads[0].reshape(a.kv_heads, -1, *heads[0].shape[1:])
            parts.append(_layer(grouped, heads[1], heads[2], output, a.scale, a.windows[layer], step))
            return q, k, v

        decoder.hidden(row[None], tap=tap)
        return {name: jnp.stack([part[name] for part in parts]) for name in parts[0]}

    return lax.map(one, tokens)


_step = jax.jit(_rows, static_argnums=(0, 3))


def _spread_rows(graph, state, tokens, step, mesh):
    rows = jax.sharding.PartitionSpec("rows")
    run = jax.shard_map(
        lambda state, tokens: _rows(graph, state, tokens, step),
        mesh=mesh, in_specs=(jax.sharding.PartitionSpec(), rows), out_specs=rows,
    )  # fmt: skip
    return run(state, tokens)


_spread = jax.jit(_spread_rows, static_argnums=(0, 3, 4))


def _layer(
    q: Float[Array, "kv_heads group tokens dim"],
    k: Float[Array, "kv_heads tokens dim"],
    v: Float[Array, "kv_heads tokens dim"],
    output: Float[Array, "kv_heads group dim hidden"],
    scale: float,
    window: int | None,
    step: int,
) -> dict[str, Array]:
    """Sum up one row in one layer."""
    length = k.shape[1]
    positions = jnp.arange(length, dtype=jnp.int32)
    gram = jnp.einsum("hgdn,hgen->hgde", output, output, precision="highest")
    seen_values = jnp.einsum("htd,hgde,hte->hgt", v, gram, v, precision="highest")  # |W v|^2

    def block(first: Int[Array, ""]) -> tuple[Array, ...]:
        size = min(_QUERIES, length)
        place = jnp.minimum(first, length - size)
        part = lax.dynamic_slice_in_dim(q, place, size, axis=2)
        at = place + jnp.arange(size, dtype=jnp.int32)
        fresh = (at >= first)[:, None]  # the last block overlaps the one before it
        scores = jnp.einsum("hgqd,htd->hgqt", part, k, precision="highest") * scale
        visible = positions[None] <= at[:, None]
        if window is not None:
            visible &= positions[None] > at[:, None] - window
        p = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
        out = jnp.einsum("hgqt,htd->hgqd", p, v, precision="highest")
        turned = jnp.einsum("hgqd,hgde->hgqe", out, gram, precision="highest")
        # |W (v - o)|^2 = |W v|^2 - 2 <W v, W o> + |W o|^2
        apart = seen_values[:, :, None] - 2 * jnp.einsum("hgqe,hte->hgqt", turned, v, precision="highest")
        apart += jnp.sum(turned * out, axis=-1)[..., None]
        squared = jnp.where(fresh, p * p, 0.0)
        importance = jnp.sum(squared * jnp.maximum(apart, 0.0), axis=-1) * scale**2
        weighted = jnp.einsum("hgq,hgqd,hgqe->hde", importance, part, part, precision="highest")
        mass = jnp.sum(jnp.where(fresh, p, 0.0), axis=(1, 2))
        return weighted, jnp.sum(squared, axis=(1, 2)), mass, jnp.sum(squared, axis=(2, 3))

    starts = jnp.arange(0, length, min(_QUERIES, length), dtype=jnp.int32)
    weighted, token, mass, head = (jnp.sum(x, axis=0) for x in lax.map(block, starts))
    return {
        "keys": jnp.sum(k, axis=1),
        "values": jnp.sum(v, axis=1),
        "key_moments": _moments(k),
        "value_moments": _moments(v),
        "query_moments": jnp.einsum("hgtd,hgte->hde", q, q, precision="highest"),
        "weighted_queries": weighted,
        "weighted_values": jnp.einsum("ht,htd,hte->hde", token, v, v, precision="highest"),
        "weighted_outputs": jnp.einsum("hg,hgde->hde", head, gram, precision="highest"),
        "importance": jnp.sum(token, axis=-1),
        "attention": jnp.pad(mass, ((0, 0), (0, max(0, _FIRST - length))))[:, :_FIRST],
        "key_samples": k[:, step // 2 :: step],
        "value_samples": v[:, step // 2 :: step],
        "query_samples": jnp.swapaxes(q[:, :, step // 2 :: step], 1, 2),
    }


def _moments(x: Float[Array, "kv_heads tokens dim"]) -> Float[Array, "kv_heads dim dim"]:
    return jnp.einsum("htd,hte->hde", x, x, precision="highest")


def _covariance(moments: np.ndarray, sums: np.ndarray, count: int) -> np.ndarray:
    mean = sums / count
    return moments / count - mean[..., :, None] * mean[..., None, :]
