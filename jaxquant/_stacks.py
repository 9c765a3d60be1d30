"""What a cache is made of: stacks of layers with packed codes, exact first tokens and a ring of exact newest tokens."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Integer, PyTree

from jaxquant._pytree import pytree, static
from jaxquant._spread import Spread
from jaxquant.protocols import Quantizer
from jaxquant.quantizers import PerLayer

Index = int | Integer[Array, ""]
T = TypeVar("T")


@pytree
class Store:
    """The keys, or the values, of a stack of layers.

    Attributes:
        quantizer: of every vector that is not exact; `at` gives that of a layer.
        codes: what `quantizer.quantize` returns, every leaf [layers, batch, kv_heads, slots, ...]; slot s holds the
            token at position s + sinks.
        sinks: the first tokens, [layers, batch, kv_heads, sinks, dim].
        window: ring of the newest tokens, position p in slot p % window, [layers, batch, kv_heads, window, dim].
    """

    quantizer: Quantizer | PerLayer
    codes: PyTree[Any]
    sinks: Float[Array, "layers batch kv_heads sinks dim"]
    window: Float[Array, "layers batch kv_heads window dim"]

    def at(self, index: Index) -> Quantizer:
        """Give the quantizer of layer `index` of the stack."""
        return self.quantizer.at(index) if isinstance(self.quantizer, PerLayer) else self.quantizer


@pytree
class Stack:
    """Layers whose quantizers are the same, or differ in their numbers alone."""

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


@pytree
class KVCache:
    """Keys and values of every layer.

    Attributes:
        stacks: the storage.
        length: tokens held, [layers, batch].
        exact_from: first position the window still holds exactly, [layers, batch]; it moves only when `crop` shortens a
            row, since tokens that left the window cannot come back.
        places: for each layer, its stack and its index there.
        spread: how tokens are dealt out to devices, or None where each has them all; see `sharding`.
    """

    stacks: tuple[Stack, ...]
    length: Int[Array, "layers batch"]
    exact_from: Int[Array, "layers batch"]
    places: tuple[tuple[int, int], ...] = static()
    spread: Spread | None = static(default=None)

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.places)

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.length.shape[-1]

    @property
    def kv_heads(self) -> int:
        """Heads of the keys and values."""
        return self.stacks[0].keys.sinks.shape[2]

    @property
    def dim(self) -> int:
        """Length of a key or value vector."""
        return self.stacks[0].keys.quantizer.dim

    @property
    def capacity(self) -> int:
        """Most tokens a row can hold."""
        return self.stacks[0].sinks + (self.stacks[0].slots if self.spread is None else self.spread.slots)

    @property
    def nbytes(self) -> int:
        """Bytes held, everything included: codes, scales, exact tokens, lengths and the quantizers' own numbers."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    @property
    def bytes_per_token(self) -> float:
        """Bytes of key and value, scales and exact copies included, for each token of capacity and kv head."""
        held = [
            (store.codes, store.sinks, store.window) for stack in self.stacks for store in (stack.keys, stack.values)
        ]
        tokens = self.layers * self.batch * self.kv_heads * self.capacity
        return sum(leaf.nbytes for leaf in jax.tree.leaves(held)) / tokens


def each_layer(name: str, quantizer: Quantizer | Sequence[Quantizer], layers: int) -> list[Quantizer]:
    """Give the quantizer of each layer."""
    if not isinstance(quantizer, Sequence):
        return [quantizer] * layers
    if len(quantizer) != layers:
        raise ValueError(f"{name} must hold one quantizer for each of {layers} layers, got {len(quantizer)}")
    return list(quantizer)


def form(quantizer: Quantizer) -> tuple[Any, ...]:
    """Describe all of a quantizer but its numbers: layers of one form can share a stack."""
    leaves, structure = jax.tree.flatten(quantizer)
    return structure, tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)


def joined(quantizers: Sequence[Quantizer]) -> Quantizer | PerLayer:
    """Join the quantizers of layers that share a stack."""
    if all(quantizer is quantizers[0] for quantizer in quantizers):
        return quantizers[0]
    return PerLayer(stacked=jax.tree.map(lambda *leaves: jnp.stack(leaves), *quantizers))


def allocate(
    quantizer: Quantizer | PerLayer,
    layers: int,
    batch: int,
    kv_heads: int,
    *,
    slots: int,
    sinks: int,
    window: int,
    dtype: str,
) -> Store:
    """Make an empty store.

    It holds a copy of the quantizer's arrays: a step that donates the cache must not take the caller's with it, nor
    donate one buffer twice where keys and values share a quantizer.
    """
    lead = (layers, batch, kv_heads)
    code = code_shapes(quantizer, (batch, kv_heads, slots))
    return Store(
        quantizer=jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, jax.Array) else leaf, quantizer),
        codes=jax.tree.map(lambda leaf: jnp.zeros((layers, *leaf.shape), leaf.dtype), code),
        sinks=jnp.zeros((*lead, sinks, quantizer.dim), dtype),
        window=jnp.zeros((*lead, window, quantizer.dim), dtype),
    )


def code_shapes(quantizer: Quantizer | PerLayer, lead: tuple[int, int, int]) -> PyTree[jax.ShapeDtypeStruct]:
    """Trace what the codes of one layer look like, for leading axes batch, kv_heads and tokens."""

    def coded(x: Array) -> PyTree[Array]:
        return (quantizer.at(0) if isinstance(quantizer, PerLayer) else quantizer).quantize(x)

    return jax.eval_shape(coded, jax.ShapeDtypeStruct((*lead, quantizer.dim), jnp.float32))


def write(
    store: Store,
    index: Index,
    x: Float[Array, "batch kv_heads new dim"],
    position: Int[Array, "batch new"],
    length: Int[Array, " batch"],
    encode: Callable[[Store, Index, Array, Array], PyTree[Any]] | None = None,
    spread: Spread | None = None,
) -> Store:
    """Store new tokens of layer `index`.

    Args:
        store: to write to.
        index: of the layer within the stack; beyond the last one, nothing is stored.
        x: the tokens.
        position: of each token in its row; tokens at `length` or beyond are dropped.
        length: of each row, the new tokens included.
        encode: codes tokens [batch, new, kv_heads, dim] into slots [batch, new] (negative: dropped) and returns the
            store's codes; None quantizes, then scatters.
        spread: where given, the codes of other devices' tokens are dropped.
    """
    rows = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
    sinks, window = store.sinks.shape[3], store.window.shape[3]
    held = position < length[:, None]

    def put(leaf: Array, slot: Array, tokens: Array) -> Array:
        slot = jnp.where(held & (slot >= 0), slot, leaf.shape[3])
        tokens = jnp.swapaxes(tokens, 1, 2).astype(leaf.dtype)
        if leaf.dtype != jnp.bfloat16:
            return leaf.at[index, rows, :, slot].set(tokens, mode="drop")
        # As bits: a CPU has no bfloat16 scatter, and would widen the whole buffer for every token.
        bits, tokens = (lax.bitcast_convert_type(x, jnp.uint16) for x in (leaf, tokens))
        return lax.bitcast_convert_type(bits.at[index, rows, :, slot].set(tokens, mode="drop"), jnp.bfloat16)

    exact_sinks, exact_window = store.sinks, store.window
    if sinks:
        exact_sinks = put(store.sinks, position, x)
    if window:
        newest = position >= length[:, None] - window
        exact_window = put(store.window, jnp.where(newest, position % window, -1), x)
    slot = position - sinks if spread is None else spread.slot(position - sinks)
    if encode is not None:
        codes = encode(store, index, jnp.swapaxes(x, 1, 2), jnp.where(held, slot, -1))
    else:
        codes = jax.tree.map(lambda leaf, new: put(leaf, slot, new), store.codes, store.at(index).quantize(x))
    return Store(quantizer=store.quantizer, codes=codes, sinks=exact_sinks, window=exact_window)


def renewed(held: T) -> T:
    """Make arrays without elements anew inside a `shard_map`: jaxlib 0.11.2 dies compiling one that passes them on."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return held
    return jax.tree.map(lambda leaf: leaf if jnp.size(leaf) else jnp.zeros_like(leaf), held)


def ring_positions(length: Int[Array, " batch"], window: int) -> Int[Array, "batch window"]:
    """Give the position of the token in each slot of the ring (negative where no token came yet)."""
    slot = jnp.arange(window, dtype=jnp.int32)
    newest = length[:, None] - 1
    return newest - (newest - slot) % window


def stack(
    halves: Sequence[Quantizer | PerLayer],
    layers: int,
    shape: tuple[int, int, int],
    dtype: str,
    *,
    sinks: int = 0,
    window: int = 0,
) -> Stack:
    """Allocate a stack of layers, with the quantizers of keys and values, for [batch, kv_heads, capacity] tokens."""
    batch, kv_heads, capacity = shape
    keys, values = (
        allocate(half, layers, batch, kv_heads, slots=capacity - sinks, sinks=sinks, window=window, dtype=dtype)
        for half in halves
    )
    return Stack(keys=keys, values=values)


def resolve(cache: KVCache, layer: Index) -> tuple[Index, int | None]:
    """Split a layer into an index that does not retrace and its stack, where that is known before tracing."""
    if isinstance(layer, int | np.integer):
        if not -cache.layers <= layer < cache.layers:
            raise ValueError(f"layer must be from {-cache.layers} to {cache.layers - 1}, got {layer}")
        layer = int(layer) % cache.layers
        return jnp.int32(layer), cache.places[layer][0]
    return layer, 0 if len(cache.stacks) == 1 else None


def switch(cache: KVCache, layer: Index, stack: int | None, branch: Callable[[int, Index], T]) -> T:
    """Call `branch(stack, index)` with the place of a layer, as `resolve` split it."""
    if len(cache.stacks) == 1:
        return branch(0, layer)
    which, index = jnp.asarray(cache.places, jnp.int32)[layer]
    if stack is not None:
        return branch(stack, index)
    return lax.switch(which, [functools.partial(branch, i) for i in range(len(cache.stacks))], index)
