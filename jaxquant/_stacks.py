"""Storage of a stack of layers: packed codes, exact first tokens and a ring of exact newest tokens."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer, PyTree

from jaxquant._pytree import pytree
from jaxquant.protocols import Quantizer

Index = int | Integer[Array, ""]


@pytree
class Store:
    """The keys, or the values, of a stack of layers.

    Attributes:
        quantizer: of every vector that is not exact.
        codes: what `quantizer.quantize` returns, every leaf [layers, batch, kv_heads, slots, ...]; slot s holds the
            token at position s + sinks.
        sinks: the first tokens, [layers, batch, kv_heads, sinks, dim].
        window: ring of the newest tokens, position p in slot p % window, [layers, batch, kv_heads, window, dim].
    """

    quantizer: Quantizer
    codes: PyTree[Any]
    sinks: Float[Array, "layers batch kv_heads sinks dim"]
    window: Float[Array, "layers batch kv_heads window dim"]


@pytree
class Stack:
    """Layers that share their quantizers."""

    keys: Store
    values: Store

    @property
    def layers(self) -> int:
        """Layers of the stack."""
        return self.keys.sinks.shape[0]

    @property
    def sinks(self) -> int:
        """Tokens at the start of a row that are exact."""
        return self.keys.sinks.shape[3]

    @property
    def window(self) -> int:
        """Newest tokens of a row that are exact."""
        return self.keys.window.shape[3]

    @property
    def slots(self) -> int:
        """Tokens of a row that there is room to code."""
        return jax.tree.leaves(self.keys.codes)[0].shape[3]


def allocate(
    quantizer: Quantizer, layers: int, batch: int, kv_heads: int, *, slots: int, sinks: int, window: int, dtype: str
) -> Store:
    """Make an empty store.

    It holds a copy of the quantizer's arrays: a step that donates the cache must not take the caller's with it, nor
    donate one buffer twice where keys and values share a quantizer.
    """
    code = jax.eval_shape(quantizer.quantize, jax.ShapeDtypeStruct((quantizer.dim,), jnp.float32))
    lead = (layers, batch, kv_heads)
    return Store(
        quantizer=jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, jax.Array) else leaf, quantizer),
        codes=jax.tree.map(lambda leaf: jnp.zeros((*lead, slots, *leaf.shape), leaf.dtype), code),
        sinks=jnp.zeros((*lead, sinks, quantizer.dim), dtype),
        window=jnp.zeros((*lead, window, quantizer.dim), dtype),
    )


def write(
    store: Store,
    index: Index,
    x: Float[Array, "batch kv_heads new dim"],
    position: Int[Array, "batch new"],
    length: Int[Array, " batch"],
) -> Store:
    """Store new tokens of layer `index`.

    Args:
        store: to write to.
        index: of the layer within the stack; beyond the last one, nothing is stored.
        x: the tokens.
        position: of each token in its row; tokens at `length` or beyond are dropped.
        length: of each row, the new tokens included.
    """
    rows = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
    sinks, window = store.sinks.shape[3], store.window.shape[3]
    held = position < length[:, None]

    def put(leaf: Array, slot: Array, tokens: Array) -> Array:
        slot = jnp.where(held & (slot >= 0), slot, leaf.shape[3])
        return leaf.at[index, rows, :, slot].set(jnp.swapaxes(tokens, 1, 2).astype(leaf.dtype), mode="drop")

    exact_sinks, exact_window = store.sinks, store.window
    if sinks:
        exact_sinks = put(store.sinks, position, x)
    if window:
        newest = position >= length[:, None] - window
        exact_window = put(store.window, jnp.where(newest, position % window, -1), x)
    codes = jax.tree.map(lambda leaf, new: put(leaf, position - sinks, new), store.codes, store.quantizer.quantize(x))
    return Store(quantizer=store.quantizer, codes=codes, sinks=exact_sinks, window=exact_window)


def ring_positions(length: Int[Array, " batch"], window: int) -> Int[Array, "batch window"]:
    """Give the position of the token in each slot of the ring (negative where no token came yet)."""
    slot = jnp.arange(window, dtype=jnp.int32)
    newest = length[:, None] - 1
    return newest - (newest - slot) % window
