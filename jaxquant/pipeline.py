"""Pipelines: a scorer, a strategy, two quantizers and a monitor that together are a cache.

Tokens are exact when they come. Once `window + block` of them are, the oldest `block` leave together: the scorer scores
them, the strategy decides what is kept of each, the quantizers code that, and the monitor moves the strategy's
threshold for what follows. A query sees what the strategy has stored, and exactly the first `sinks` tokens and those
that did not leave yet. When a block leaves depends on positions alone, so the input may be cut into chunks in any way:
results differ by rounding at most.

`init` makes the cache, and decoders and `attention.attend` take it like a `KVCache`.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Integer

from jaxquant import _attention, _pipeline, attention, cache
from jaxquant._pipeline import Number, Pipeline, State
from jaxquant._pytree import pytree, static
from jaxquant.cache import KVCache
from jaxquant.protocols import AttentiveScorer
from jaxquant.quantizers import Exact

Index = int | Integer[Array, ""]


@pytree
class PipelineCache:
    """The cache of a pipeline.

    Attributes:
        pipeline: what fills it.
        state: of the layers that are compressed.
        exact: the layers that are not, or None.
        places: for each layer, whether it is exact, and its index among its like.
        capacity: most tokens a row can hold.
    """

    pipeline: Pipeline
    state: State
    exact: KVCache | None
    places: tuple[tuple[bool, int], ...] = static()
    capacity: int = static()

    @property
    def length(self) -> Int[Array, "layers batch"]:
        """Tokens of each row that came."""
        if self.exact is None:
            return self.state.length
        return jnp.stack([(self.exact if exact else self.state).length[index] for exact, index in self.places])

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.places)

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.state.length.shape[1]

    @property
    def kv_heads(self) -> int:
        """Heads of the keys and values."""
        return self.state.recent[0].shape[2]

    @property
    def dim(self) -> int:
        """Length of a key or value vector."""
        return self.state.recent[0].shape[4]

    @property
    def exact_tokens(self) -> int:
        """Most tokens that a compressed layer holds exactly."""
        return self.state.sinks[0].shape[3] + self.state.recent[0].shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes held, everything included."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self) if hasattr(leaf, "nbytes"))

    @property
    def bytes_per_token(self) -> float:
        """Bytes of all state for each token of capacity and kv head; quantizers and the pipeline's numbers left out."""
        whole = 0.0 if self.exact is None else self.exact.bytes_per_token * self.exact.layers
        tokens = self.batch * self.kv_heads * self.capacity
        return (sum(leaf.nbytes for leaf in jax.tree.leaves(self.state)) / tokens + whole) / self.layers

    def attend(
        self,
        q: Float[Array, "batch new heads dim"],
        k: Float[Array, "batch new kv_heads dim"],
        v: Float[Array, "batch new kv_heads dim"],
        layer: Index,
        *,
        mask: Bool[Array, "batch new"] | None = None,
        scale: Number | None = None,
        soft_cap: Number | None = None,
        sliding_window: int | Integer[Array, ""] | None = None,
    ) -> tuple[Float[Array, "batch new heads dim"], Float[Array, "batch new heads"], "PipelineCache"]:
        """Append tokens and attend causally from each of them; see `attention.prefill_attention`."""
        if k.shape != (self.batch, q.shape[1], self.kv_heads, self.dim) or v.shape != k.shape:
            expected = [self.batch, q.shape[1], self.kv_heads, self.dim]
            raise ValueError(
                f"k and v must have shape [batch, new, kv_heads, dim] = {expected}, "
                f"got {list(k.shape)} and {list(v.shape)}"
            )
        if q.shape[0] != self.batch or q.shape[3] != self.dim or q.shape[2] % self.kv_heads or not q.shape[2]:
            raise ValueError(
                f"q must have shape [batch, new, heads, dim] = {[self.batch, 'new', 'heads', self.dim]} with heads a "
                f"multiple of kv_heads = {self.kv_heads}, got {list(q.shape)}"
            )
        if isinstance(layer, int | np.integer) and not -self.layers <= layer < self.layers:
            raise ValueError(f"layer must be from {-self.layers} to {self.layers - 1}, got {layer}")
        rule = _pipeline.Rule(*_attention.rule_of(self.dim, scale, soft_cap, sliding_window)[:3])

        def coded(held: PipelineCache, index: Index) -> tuple[Array, Array, PipelineCache]:
            out, lse, state = _pipeline.attend(
                held.pipeline,
                held.state,
                jnp.int32(held.capacity),
                jnp.int32(layer),
                jnp.int32(index),
                q,
                k,
                v,
                mask,
                rule,
            )
            return out, lse, dataclasses.replace(held, state=state)

        def whole(held: PipelineCache, index: Index) -> tuple[Array, Array, PipelineCache]:
            assert held.exact is not None
            out, lse, exact = attention.prefill_attention(
                q, k, v, held.exact, index,
                mask=mask, scale=scale, soft_cap=soft_cap, sliding_window=sliding_window,
            )  # fmt: skip
            return out, lse, dataclasses.replace(held, exact=exact)

        if isinstance(layer, int | np.integer):
            exact, index = self.places[layer]
            return (whole if exact else coded)(self, index)
        if self.exact is None:
            return coded(self, layer)
        exact, index = jnp.asarray(self.places, jnp.int32)[layer]
        return lax.cond(exact == 1, whole, coded, self, index)

    def reorder(self, rows: Integer[Array, " rows"]) -> "PipelineCache":
        """Take rows of the batch in a new order, with repetition or omission, as `cache.reorder` does."""
        state = jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=1, mode="clip"), self.state)
        return dataclasses.replace(
            self, state=state, exact=None if self.exact is None else cache.reorder(self.exact, rows)
        )

    def crop(self, length: int | Integer[np.ndarray, "*batch"]) -> "PipelineCache":
        """Forget every token from position `length` on, as `cache.crop` does; not under `jit`.

        Tokens that left stay coded. If what remains is longer than the window behind them, it is as if the tokens had
        never come; a shorter rest has fewer exact tokens than it would have had.

        Args:
            length: tokens to keep, one number or one a row; rows that are shorter stay as they are.

        Raises:
            ValueError: some of the tokens to forget have left the exact window, or scorer or monitor has watched their
                attention: fork with `reorder` before they come instead.

        Example:
            >>> from jaxquant.methods import turboquant
            >>> k, v = turboquant.kv(jax.random.key(0), dim=64, bits_k=4, bits_v=4)
            >>> c = init(Pipeline(keys=k, values=v, block=8), layers=1, batch=1, kv_heads=1, capacity=64)
            >>> x = jnp.ones((1, 20, 1, 64))
            >>> c.attend(x, x, x, 0)[2].crop(18).length
            Array([[18]], dtype=int32)
        """
        if np.shape(length) not in ((), (self.batch,)):
            raise ValueError(
                f"length must be one number or {self.batch}, one a row, got shape {list(np.shape(length))}"
            )
        came, start = np.asarray(self.state.length), np.asarray(self.state.start)
        kept = np.clip(np.asarray(length, np.int32), 0, came)
        scorer, monitor = self.pipeline.scorer, self.pipeline.monitor
        watcher = scorer if isinstance(scorer, AttentiveScorer) else monitor
        if watcher is None:
            least = np.where(start > self.state.sinks[0].shape[3], start, 0)
            why = "earlier tokens have left the exact window"
        else:
            least = came
            why = f"{type(watcher).__name__} has watched the attention of later ones, which cannot be taken back"
        if np.any(kept < least):
            raise ValueError(
                f"length must be at least {least.max(axis=0).tolist()}, one for each row, got {length}: {why}; fork "
                "with reorder before tokens come that may have to go"
            )
        return dataclasses.replace(
            self,
            state=dataclasses.replace(self.state, length=jnp.asarray(kept)),
            exact=None if self.exact is None else cache.crop(self.exact, jnp.asarray(length, jnp.int32)),
        )


def init(
    pipeline: Pipeline,
    *,
    layers: int,
    batch: int,
    kv_heads: int,
    capacity: int,
    sinks: int = 0,
    window: int = 0,
    exact_layers: Sequence[int] = (),
    dtype: DTypeLike = jnp.bfloat16,
) -> PipelineCache:
    """Allocate an empty cache.

    Args:
        pipeline: of all layers but the exact ones.
        layers: of the model.
        batch: rows.
        kv_heads: heads of the keys and values (not of the queries).
        capacity: most tokens a row can hold. Tokens that come after are dropped.
        sinks: tokens at the start of a row that stay exact.
        window: newest tokens that stay exact, beside those of an unfinished block.
        exact_layers: layers that are not compressed; negative numbers count from the end.
        dtype: of the tokens kept exact, and of the exact layers.

    Raises:
        ValueError: a size is out of range, all layers are exact, or the quantizers' dims differ.

    Example:
        >>> from jaxquant.methods import turboquant
        >>> k, v = turboquant.kv(jax.random.key(0), dim=128, bits_k=4, bits_v=2)
        >>> c = init(Pipeline(keys=k, values=v, block=16), layers=2, batch=1, kv_heads=8, capacity=1024)
        >>> round(c.bytes_per_token - 100)
        6
    """
    sizes = {"layers": layers, "batch": batch, "kv_heads": kv_heads, "capacity": capacity, "block": pipeline.block}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if not 0 <= sinks < capacity:
        raise ValueError(f"sinks must be from 0 to capacity - 1 = {capacity - 1}, got {sinks}")
    if window < 0:
        raise ValueError(f"window must not be negative, got {window}")
    pair = pipeline.keys, pipeline.values
    if pair[0].dim != pair[1].dim:
        raise ValueError(f"keys and values must have the same dim, got {pair[0].dim} and {pair[1].dim}")
    outside = [layer for layer in exact_layers if not -layers <= layer < layers]
    if outside:
        raise ValueError(f"exact_layers must be from {-layers} to {layers - 1}, got {outside}")
    exact = {layer % layers for layer in exact_layers}
    if len(exact) == layers:
        raise ValueError(f"exact_layers names all {layers} layers: use a cache of quantizers.Exact")
    places = tuple(
        (layer in exact, sum((other in exact) == (layer in exact) for other in range(layer))) for layer in range(layers)
    )

    dim, block = pair[0].dim, pipeline.block
    blocks = max(1, -(-(capacity - sinks - window) // block) - 1)  # the last one never leaves
    lead, sizes = (batch, kv_heads), (batch, kv_heads, dim)
    first, recent = (jnp.zeros((*lead, tokens, dim), dtype) for tokens in (sinks, window + block))
    attentive = isinstance(pipeline.scorer, AttentiveScorer)
    one = State(
        sinks=(first, first),
        recent=(recent, recent),
        length=jnp.zeros(batch, jnp.int32),
        start=jnp.full(batch, sinks, jnp.int32),
        store=pipeline.strategy.init(pair, batch=batch, kv_heads=kv_heads, capacity=blocks * block, block=block),
        scorer=None if pipeline.scorer is None else pipeline.scorer.init(*sizes),
        received=jnp.zeros((*lead, window + block), jnp.float32) if attentive else None,
        monitor=None if pipeline.monitor is None else pipeline.monitor.init(*sizes),
        threshold=jnp.full(batch, pipeline.threshold, jnp.float32),
        entropy=None if pipeline.monitor is None else jnp.zeros((batch, 2), jnp.float32),
    )
    name = jnp.dtype(dtype).name
    whole = Exact(dim=dim, dtype=name)  # pyright: ignore[reportArgumentType]
    return PipelineCache(
        # A copy: a step that donates the cache must not take the caller's arrays with it.
        pipeline=jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), pipeline),
        state=jax.tree.map(lambda leaf: jnp.tile(leaf, (layers - len(exact),) + (1,) * leaf.ndim), one),
        exact=cache.init(
            whole, whole, layers=len(exact), batch=batch, kv_heads=kv_heads, capacity=capacity, dtype=dtype
        )
        if exact
        else None,
        places=places,
        capacity=capacity,
    )
