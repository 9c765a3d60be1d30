"""A cache over several devices: rows, kv heads and tokens each along an axis of a mesh.

Rows and kv heads are independent, so that sharding them costs no communication. The tokens of a row are dealt out page
by page (`Layout.page`), and what devices find in their shares is joined by one collective over outputs and
log-sum-exps; exact first and newest tokens, which are few, are on every device of that axis.

The functions here take arrays that are sharded as `specs` says (or that XLA then shards so) and call those of `cache`
and `attention` on every device by `jax.shard_map`. A caller's own `shard_map` may do the same: a cache made by `init`
knows how its tokens are dealt out. `cache.crop` and `cache.reorder` work on a sharded cache as they are.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Integer

from jaxquant import attention
from jaxquant import cache as caches
from jaxquant._placement import Layout, check, mapped, quantizer_specs, shardings, spread_of
from jaxquant._placement import specs as specs
from jaxquant._spread import Spread
from jaxquant._stacks import Index, KVCache, Stack, Store
from jaxquant.attention import Implementation, Number
from jaxquant.protocols import Quantizer


def init(
    layout: Layout,
    keys: Quantizer | Sequence[Quantizer],
    values: Quantizer | Sequence[Quantizer],
    *,
    layers: int,
    batch: int,
    kv_heads: int,
    capacity: int,
    sinks: int = 0,
    window: int = 0,
    exact_layers: Sequence[int] = (),
    dtype: DTypeLike = jnp.bfloat16,
) -> KVCache:
    """Allocate an empty cache over the devices of a mesh; no device ever holds more than its share.

    Args:
        layout: of the cache.
        keys: see `cache.init`.
        values: see `cache.init`.
        layers: of the model.
        batch: rows, a multiple of the devices along their axis.
        kv_heads: heads of the keys and values, likewise.
        capacity: most tokens of a row; where tokens are dealt out, room is made for whole pages on every device.
        sinks: tokens at the start of a row that stay exact.
        window: newest tokens that stay exact.
        exact_layers: layers that are not compressed; not where tokens are dealt out and there are sinks.
        dtype: of the tokens kept exact, and of the exact layers.

    Raises:
        ValueError: a size is not a multiple of the devices it is shared by, or `cache.init` refuses it.

    Example:
        >>> from jaxquant.methods import turboquant
        >>> k, v = turboquant.kv(jax.random.key(0), dim=64, bits_k=4, bits_v=2)
        >>> layout = Layout(jax.make_mesh((1,), ("x",)), tokens="x", page=32)
        >>> init(layout, k, v, layers=1, batch=1, kv_heads=2, capacity=100).capacity
        128
    """
    check(layout, batch=batch, kv_heads=kv_heads)
    if layout.tokens is not None and exact_layers and sinks:
        raise ValueError("exact_layers and sinks cannot be had together where tokens are dealt out")
    spread = spread_of(layout, capacity - sinks)
    own = capacity if spread is None else sinks + spread.slots // spread.devices

    def local(keys: Any, values: Any) -> KVCache:
        empty = caches.init(
            keys,
            values,
            layers=layers,
            batch=batch // layout.devices(layout.batch),
            kv_heads=kv_heads // layout.devices(layout.kv_heads),
            capacity=own,
            sinks=sinks,
            window=window,
            exact_layers=exact_layers,
            dtype=dtype,
        )
        return dataclasses.replace(empty, spread=spread)

    def share(leaf: Array, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(NamedSharding(layout.mesh, spec).shard_shape(leaf.shape), leaf.dtype)

    given = _each(layout, keys), _each(layout, values)
    empty = jax.eval_shape(local, *jax.tree.map(share, (keys, values), given))
    return jax.jit(mapped(layout, local, given, specs(layout, empty)))(keys, values)


@functools.partial(jax.jit, static_argnames=("layout", "layer", "implementation"))
def _append(layout: Layout, cache: KVCache, layer: int | None, arrays: dict[str, Any], implementation: Any) -> KVCache:
    own = specs(layout, cache)
    named = {"k": layout.chunk, "v": layout.chunk, "mask": PartitionSpec(layout.batch)}

    def local(cache: KVCache, arrays: dict[str, Any]) -> KVCache:
        index = arrays.pop("layer") if layer is None else layer
        return caches.append(cache, index, **arrays, implementation=implementation)

    return mapped(layout, local, (own, {name: named.get(name, PartitionSpec()) for name in arrays}), own)(cache, arrays)


def append(
    layout: Layout,
    cache: KVCache,
    layer: Index,
    k: Float[Array, "batch new kv_heads dim"],
    v: Float[Array, "batch new kv_heads dim"],
    *,
    mask: Bool[Array, "batch new"] | None = None,
    implementation: caches.Implementation | None = None,
) -> KVCache:
    """Do what `cache.append` does, on every device for its share: no communication."""
    number, arrays = _split(layer, k=k, v=v, mask=mask)
    return _append(layout, cache, number, arrays, implementation)


@functools.partial(jax.jit, static_argnames=("layout", "layer", "settings"))
def _attend(layout: Layout, cache: KVCache, layer: int | None, arrays: dict[str, Any], settings: tuple) -> Any:
    own = specs(layout, cache)
    prefill = "k" in arrays
    rows = layout.chunk if prefill else layout.queries
    row = PartitionSpec(layout.batch)
    named = {"q": rows, "k": rows, "v": rows, "mask": row, "visible": row}

    def local(cache: KVCache, arrays: dict[str, Any]) -> Any:
        index = arrays.pop("layer") if layer is None else layer
        attend: Callable[..., Any] = attention.prefill_attention if prefill else attention.decode_attention
        given = [arrays.pop(name) for name in (("q", "k", "v") if prefill else ("q",))]
        return attend(*given, cache, index, **arrays, **dict(settings))

    outs = (rows, rows, own) if prefill else (rows, rows)
    in_specs = (own, {name: named.get(name, PartitionSpec()) for name in arrays})
    return mapped(layout, local, in_specs, outs)(cache, arrays)


def decode_attention(
    layout: Layout,
    q: Float[Array, "batch heads dim"],
    cache: KVCache,
    layer: Index,
    *,
    scale: Number | None = None,
    soft_cap: Number | None = None,
    sliding_window: int | Integer[Array, ""] | None = None,
    visible: Bool[Array, "batch capacity"] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "batch heads dim"], Float[Array, "batch heads"]]:
    """Do what `attention.decode_attention` does: one collective where tokens are dealt out, none otherwise."""
    number, arrays = _split(layer, q=q, scale=scale, soft_cap=soft_cap, sliding_window=sliding_window, visible=visible)
    return _attend(layout, cache, number, arrays, (("implementation", implementation),))


def prefill_attention(
    layout: Layout,
    q: Float[Array, "batch new heads dim"],
    k: Float[Array, "batch new kv_heads dim"],
    v: Float[Array, "batch new kv_heads dim"],
    cache: KVCache,
    layer: Index,
    *,
    mask: Bool[Array, "batch new"] | None = None,
    scale: Number | None = None,
    soft_cap: Number | None = None,
    sliding_window: int | Integer[Array, ""] | None = None,
    visible: Bool[Array, "batch capacity"] | None = None,
    chunk: Literal["codes", "exact"] = "codes",
) -> tuple[Float[Array, "batch new heads dim"], Float[Array, "batch new heads"], KVCache]:
    """Do what `attention.prefill_attention` does: one collective for each 256 tokens where tokens are dealt out."""
    number, arrays = _split(
        layer,
        **{"q": q, "k": k, "v": v, "mask": mask, "visible": visible},
        **{"scale": scale, "soft_cap": soft_cap, "sliding_window": sliding_window},
    )
    return _attend(layout, cache, number, arrays, (("chunk", chunk),))


def dealt(layout: Layout, cache: KVCache) -> KVCache:
    """Place a cache that one device made, or that comes from a file, over the devices of a mesh, tokens dealt out.

    The cache must fit one device, or be placed along its rows or kv heads.

    Raises:
        ValueError: its tokens are dealt out already, its layers differ in their sinks, or a size is not a multiple of
            the devices it is shared by.

    Example:
        >>> from jaxquant.methods import turboquant
        >>> k, v = turboquant.kv(jax.random.key(0), dim=64, bits_k=4, bits_v=2)
        >>> c = caches.init(k, v, layers=1, batch=1, kv_heads=2, capacity=100)
        >>> dealt(Layout(jax.make_mesh((1,), ("x",)), tokens="x", page=32), c).capacity
        128
    """
    if cache.spread is not None:
        raise ValueError("the tokens of the cache are dealt out already: see sharding.joined")
    sinks = cache.stacks[0].sinks
    spread = spread_of(layout, cache.capacity - sinks)
    if spread is not None:
        if any(stack.sinks != sinks for stack in cache.stacks):
            raise ValueError("layers must have the same sinks where tokens are dealt out")
        token = np.argsort(spread.order())  # in every slot

        def placed(leaf: Array) -> Array:
            padding = [(0, 0)] * leaf.ndim
            padding[3] = (0, spread.slots - leaf.shape[3])
            return jnp.take(jnp.pad(leaf, padding), token, axis=3)

        cache = _recoded(cache, placed, spread)
    return jax.device_put(cache, shardings(layout, cache))


def joined(cache: KVCache) -> KVCache:
    """Put the tokens of a row back in order: the same cache, not dealt out; for files, and to read it as a whole.

    Example:
        >>> from jaxquant.quantizers import Exact
        >>> layout = Layout(jax.make_mesh((1,), ("x",)), tokens="x", page=32)
        >>> c = init(layout, Exact(dim=64), Exact(dim=64), layers=1, batch=1, kv_heads=2, capacity=100)
        >>> caches.materialize(joined(c), 0)[0].shape
        (1, 128, 2, 64)
    """
    if cache.spread is None:
        return cache
    order = cache.spread.order()

    def put_back(leaf: Array) -> Array:
        place = jax.typeof(leaf).sharding  # knows axes of the mesh only where they are explicit
        if any(axis is not None for axis in place.spec[3:4]):
            whole = PartitionSpec(*place.spec[:3], None, *place.spec[4:])
            leaf = jax.sharding.reshard(leaf, NamedSharding(place.mesh, whole))
        return jnp.take(leaf, order, axis=3)

    return _recoded(cache, put_back, None)


def _recoded(cache: KVCache, change: Callable[[Array], Array], spread: Spread | None) -> KVCache:
    """Change every array of codes."""

    def store(old: Store) -> Store:
        return dataclasses.replace(old, codes=jax.tree.map(change, old.codes))

    stacks = tuple(Stack(keys=store(stack.keys), values=store(stack.values)) for stack in cache.stacks)
    return dataclasses.replace(cache, stacks=stacks, spread=spread)


def _split(layer: Index, **arrays: Any) -> tuple[int | None, dict[str, Any]]:
    """Keep a layer known before tracing static, and drop what is not given."""
    arrays = {name: value for name, value in arrays.items() if value is not None}
    if isinstance(layer, int | np.integer):
        return int(layer), arrays
    return None, arrays | {"layer": layer}


def _each(layout: Layout, given: Quantizer | Sequence[Quantizer]) -> Any:
    if isinstance(given, Sequence):
        return type(given)(quantizer_specs(layout, one) for one in given)  # pyright: ignore[reportCallIssue]
    return quantizer_specs(layout, given)
