"""Writing and reading one layer of a cache, compiled: what `cache` calls when it has checked its arguments."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxquant import _stacks
from jaxquant._kernels import cuda_encode
from jaxquant._stacks import Index, KVCache, Stack, Store, switch


@functools.partial(jax.jit, static_argnames=("stack", "fused"))
def append(
    cache: KVCache,
    layer: Index,
    stack: int | None,
    k: Array,
    v: Array,
    mask: Array | None,
    fused: tuple[tuple[bool, bool], ...],
) -> KVCache:
    """Append keys and values [batch, new, kv_heads, dim], a mask [batch, new] leaving padding out.

    `stack` is the one that has the layer, None where that is known at run time only; `fused` says for the keys and the
    values of every stack whether the kernel codes them.
    """
    start = cache.length[layer]
    valid = jnp.ones(k.shape[:2], bool) if mask is None else mask
    count = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
    length = jnp.minimum(start + count[:, -1], cache.capacity) if k.shape[1] else start
    position = jnp.where(valid, start[:, None] + count - 1, cache.capacity)

    # Where the layer is known only at run time every stack is written to, all but one beyond its end, where writes are
    # dropped: the branches of a conditional would copy a stack.
    which, index = jnp.asarray(cache.places, jnp.int32)[layer]
    stacks = list(cache.stacks)
    for i, held in enumerate(stacks):
        if stack in (i, None):
            place = jnp.where(which == i, index, held.layers)
            keys, values = (
                _stacks.write(
                    *(store, place, jnp.swapaxes(x, 1, 2), position, length),
                    encode=cuda_encode.encode if fuse else None,
                    spread=cache.spread,
                )
                for store, x, fuse in zip((held.keys, held.values), (k, v), fused[i], strict=True)
            )
            stacks[i] = Stack(keys=keys, values=values)

    after = dataclasses.replace(cache, stacks=tuple(stacks), length=cache.length.at[layer].set(length))
    return _stacks.renewed(after)


@functools.partial(jax.jit, static_argnames="stack")
def materialize(cache: KVCache, layer: Index, stack: int | None) -> tuple[Array, Array]:
    """Decode keys and values [batch, capacity, kv_heads, dim] of a layer; `stack` as in `append`."""
    length, exact_from = cache.length[layer], cache.exact_from[layer]
    rows = jnp.arange(cache.batch, dtype=jnp.int32)[:, None]
    held = jnp.arange(cache.capacity, dtype=jnp.int32) < length[:, None]

    def decoded(store: Store, index: Index) -> Array:
        sinks, window = store.sinks.shape[3], store.window.shape[3]
        codes = jax.tree.map(lambda leaf: leaf[index], store.codes)
        quantizer = store.at(index)
        coded = quantizer.restore(quantizer.expand(codes))
        x = jnp.concatenate([store.sinks[index].astype(jnp.float32), coded], axis=2)
        if window:
            position = _stacks.ring_positions(length, window)
            exact = (position >= exact_from[:, None]) & (position >= sinks)
            position = jnp.where(exact, position, cache.capacity)
            recent = jnp.swapaxes(store.window[index], 1, 2).astype(jnp.float32)
            x = x.at[rows, :, position].set(recent, mode="drop")
        return jnp.swapaxes(jnp.where(held[:, None, :, None], x, 0.0), 1, 2)

    def both(which: int, index: Index) -> tuple[Array, Array]:
        return decoded(cache.stacks[which].keys, index), decoded(cache.stacks[which].values, index)

    return switch(cache, layer, stack, both)
