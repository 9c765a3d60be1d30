"""What is stored of a token: every token (`Append`), or those that score best (`Evict`).

Both satisfy `protocols.Strategy`; papers add theirs in `methods`. Storage is a pytree of arrays whose first axis is the
rows of the batch.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxquant._pytree import pytree, static
from jaxquant.protocols import Held, Quantizer

Pair = tuple[Quantizer, Quantizer]


@pytree
class Appended:
    """Tokens in the order they came.

    Attributes:
        codes: of keys and of values, every leaf [batch, kv_heads, tokens, ...], or fewer along the axis of tokens where
            a quantizer codes several together.
        tokens: stored.
        start: position of the first token.
    """

    codes: tuple[PyTree[Any], PyTree[Any]]
    tokens: Int[Array, " batch"]
    start: Int[Array, " batch"]


@pytree
class Append:
    """Store every token. Quantizers may code the tokens of a block together."""

    def init(self, quantizers: Pair, /, *, batch: int, kv_heads: int, capacity: int, block: int) -> Appended:
        """Allocate."""
        codes = empty(quantizers, batch, kv_heads, block)
        codes = jax.tree.map(lambda leaf: jnp.tile(leaf, (1, 1, capacity // block) + (1,) * (leaf.ndim - 3)), codes)
        nothing = jnp.zeros(batch, jnp.int32)
        return Appended(codes=codes, tokens=nothing, start=nothing)

    def store(
        self,
        state: Appended,
        quantizers: Pair,
        k: Float[Array, "batch kv_heads block dim"],
        v: Float[Array, "batch kv_heads block dim"],
        scores: Float[Array, "batch kv_heads block"] | None,
        step: Int[Array, " batch"],
        threshold: Float[Array, " batch"],
        /,
    ) -> Appended:
        """Code a block and append it."""
        return Appended(
            codes=append(state.codes, coded(quantizers, k, v), state.tokens // k.shape[2]),
            tokens=state.tokens + k.shape[2],
            start=jnp.where(state.tokens == 0, step, state.start),
        )

    def read(self, state: Appended, quantizers: Pair, queries: Float[Array, "batch kv_heads rows dim"], /) -> Held:
        """Decode everything."""
        k, v = decoded(quantizers, state.codes)
        return Held(k=k, v=v, position=positions(state, k.shape[2]))


@pytree
class Kept:
    """The best tokens of each row and kv head, in the order of their positions.

    Attributes:
        codes: of keys and of values, every leaf [batch, kv_heads, slots, ...].
        position: -1 where the slot is empty.
        score: of each token.
    """

    codes: tuple[PyTree[Any], PyTree[Any]]
    position: Int[Array, "batch kv_heads slots"]
    score: Float[Array, "batch kv_heads slots"]


@pytree
class Evict:
    """Store the tokens of the highest scores, each head its own, and forget the others for good.

    A token below the threshold is forgotten even where there is room. Of equal scores the older token stays.

    Attributes:
        keep: share of the capacity that there are slots for.
    """

    keep: float = static(default=0.5)

    def init(self, quantizers: Pair, /, *, batch: int, kv_heads: int, capacity: int, block: int) -> Kept:
        """Allocate."""
        slots = max(1, round(self.keep * capacity))
        return Kept(
            codes=empty(quantizers, batch, kv_heads, slots),
            position=jnp.full((batch, kv_heads, slots), -1, jnp.int32),
            score=jnp.zeros((batch, kv_heads, slots), jnp.float32),
        )

    def store(
        self,
        state: Kept,
        quantizers: Pair,
        k: Float[Array, "batch kv_heads block dim"],
        v: Float[Array, "batch kv_heads block dim"],
        scores: Float[Array, "batch kv_heads block"] | None,
        step: Int[Array, " batch"],
        threshold: Float[Array, " batch"],
        /,
    ) -> Kept:
        """Let a block compete with what is held."""
        if scores is None:
            raise ValueError("Evict needs a scorer: without scores there is no telling which tokens to keep")
        new = Kept(codes=coded(quantizers, k, v), position=run(step, scores.shape), score=scores)
        return best(state, new, threshold)

    def read(self, state: Kept, quantizers: Pair, queries: Float[Array, "batch kv_heads rows dim"], /) -> Held:
        """Decode what is held."""
        k, v = decoded(quantizers, state.codes)
        return Held(k=k, v=v, position=state.position, score=state.score)

    def rescore(self, state: Kept, scores: Float[Array, "batch kv_heads slots"], /) -> Kept:
        """Replace the scores."""
        return Kept(codes=state.codes, position=state.position, score=scores)


def best(held: Kept, new: Kept, threshold: Float[Array, " batch"]) -> Kept:
    """Keep the best of what is held and what is new, as many as were held, in the order of their positions."""
    slots = held.position.shape[2]
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b.astype(a.dtype)], axis=2), held, new)
    rank = jnp.nan_to_num(both.score, nan=0.0)
    lives = (both.position >= 0) & (rank >= threshold[:, None, None])
    order = jnp.argsort(jnp.where(lives, -rank, jnp.inf), axis=-1, stable=True)[..., :slots]
    order = jnp.sort(order, axis=-1)  # what is new came last, and what is held was in order

    def taken(leaf: Array) -> Array:
        return jnp.take_along_axis(leaf, order.reshape(*order.shape, *(1,) * (leaf.ndim - 3)), axis=2)

    chosen = jax.tree.map(taken, both)
    return Kept(codes=chosen.codes, position=jnp.where(taken(lives), chosen.position, -1), score=chosen.score)


def coded(quantizers: Pair, k: Array, v: Array) -> tuple[PyTree[Any], PyTree[Any]]:
    """Code keys and values."""
    return quantizers[0].quantize(k), quantizers[1].quantize(v)


def decoded(quantizers: Pair, codes: tuple[PyTree[Any], PyTree[Any]]) -> tuple[Array, Array]:
    """Decode keys and values, in float32."""
    keys, values = (q.restore(q.expand(code)) for q, code in zip(quantizers, codes, strict=True))
    return keys, values


def empty(quantizers: Pair, batch: int, kv_heads: int, tokens: int) -> tuple[PyTree[Any], PyTree[Any]]:
    """Allocate codes for some tokens."""
    x = jax.ShapeDtypeStruct((batch, kv_heads, tokens, quantizers[0].dim), jnp.float32)
    shapes = jax.eval_shape(lambda k, v: coded(quantizers, k, v), x, x)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def append(codes: PyTree[Any], new: PyTree[Any], blocks: Int[Array, " batch"]) -> PyTree[Any]:
    """Write a block of codes behind the blocks that are there; beyond the end it is dropped."""

    def put(leaf: Array, block: Array) -> Array:
        size = block.shape[2]
        slot = blocks[:, None] * size + jnp.arange(size, dtype=jnp.int32)
        rows = jnp.arange(leaf.shape[0], dtype=jnp.int32)[:, None]
        return leaf.at[rows, :, slot].set(jnp.swapaxes(block, 1, 2).astype(leaf.dtype), mode="drop")

    return jax.tree.map(put, codes, new)


def positions(state: Appended, entries: int) -> Int[Array, "batch 1 entries"]:
    """Give the position of each of the appended tokens, -1 where none came yet."""
    slot = jnp.arange(entries, dtype=jnp.int32)
    return jnp.where(slot < state.tokens[:, None], state.start[:, None] + slot, -1)[:, None]


def run(step: Int[Array, " batch"], shape: tuple[int, ...]) -> Int[Array, "batch kv_heads block"]:
    """Give the positions of a block that starts at `step`."""
    return jnp.broadcast_to(step[:, None, None] + jnp.arange(shape[2], dtype=jnp.int32), shape)


def rows_where(mask: Bool[Array, " batch"], new: PyTree[Any], old: PyTree[Any]) -> PyTree[Any]:
    """Take the rows of `new` where `mask` is true, and of `old` elsewhere."""
    return jax.tree.map(lambda a, b: jnp.where(mask.reshape(-1, *(1,) * (a.ndim - 1)), a, b), new, old)
