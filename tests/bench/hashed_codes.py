"""Full caches whose codes are a hash of their place: equal however they are laid out, and never there uncompressed."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxquant import sharding
from jaxquant._stacks import KVCache, Stack

_ODD = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1)  # of xxHash


def full(empty: Callable[[], KVCache], layout: sharding.Layout | None = None) -> KVCache:
    """Give the cache that `empty` makes with every slot taken; it must have no sinks and no window.

    What is empty is never there: peak memory is that of the cache.
    """
    shapes = jax.eval_shape(empty)
    bare = jax.jit(lambda: _with_codes(empty(), [None] * 2 * len(shapes.stacks)))()
    made = functools.partial(_codes, layout, shapes)
    if layout is not None:
        own = _codes_of(sharding.specs(layout, shapes))
        made = jax.shard_map(made, mesh=layout.mesh, in_specs=(), out_specs=own, check_vma=False)
    held = _with_codes(bare, jax.jit(made)())
    return dataclasses.replace(held, length=jnp.full_like(held.length, held.capacity))


def _codes_of(held: KVCache) -> list[Any]:
    return [store.codes for stack in held.stacks for store in (stack.keys, stack.values)]


def _with_codes(held: KVCache, codes: list[Any]) -> KVCache:
    pairs = zip(held.stacks, codes[::2], codes[1::2], strict=True)
    stacks = tuple(
        Stack(keys=dataclasses.replace(stack.keys, codes=keys), values=dataclasses.replace(stack.values, codes=values))
        for stack, keys, values in pairs
    )
    return dataclasses.replace(held, stacks=stacks)


def _codes(layout: sharding.Layout | None, shapes: KVCache) -> list[Any]:
    def share(axis: str, size: int) -> Array:
        mesh_axis = layout and getattr(layout, axis)
        if layout is None or mesh_axis is None:
            return jnp.arange(size, dtype=jnp.uint32)
        own = size // layout.devices(mesh_axis)
        return jnp.arange(own, dtype=jnp.uint32) + lax.axis_index(mesh_axis).astype(jnp.uint32) * own

    def tokens(slots: int) -> Array:
        if layout is None or shapes.spread is None:
            return jnp.arange(slots, dtype=jnp.uint32)
        return shapes.spread.token(jnp.arange(slots // shapes.spread.devices, dtype=jnp.int32)).astype(jnp.uint32)

    def leaf(seed: int, old: jax.ShapeDtypeStruct) -> Array:
        layers, rows, heads, slots, *last = old.shape
        places = [
            jnp.arange(layers, dtype=jnp.uint32),
            share("batch", rows),
            share("kv_heads", heads),
            tokens(slots),
            jnp.arange(math.prod(last), dtype=jnp.uint32),
        ]
        number = jnp.uint32(seed)
        for place, odd in zip(places, _ODD, strict=True):
            number = (number[..., None] ^ (place + 1)) * jnp.uint32(odd)
            number ^= number >> 15
        number = number.reshape(*number.shape[:4], *last)
        if old.dtype == jnp.uint8:
            return (number >> 11).astype(jnp.uint8)
        size = (number >> 8).astype(jnp.float32) / 2**24
        return ((0.7 + 0.6 * size) * shapes.dim**0.5).astype(old.dtype)

    leaves, form = jax.tree.flatten(_codes_of(shapes))
    return jax.tree.unflatten(form, [leaf(seed, each) for seed, each in enumerate(leaves, 1)])
