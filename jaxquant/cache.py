"""The KV cache: packed codes are the storage, and every operation is a pure function of it.

A row of the cache holds the tokens of one sequence, positions 0, 1, ... `length - 1`. The first `sinks` of them are
kept exact and never coded. Every later token is coded when it arrives, and the newest `window` tokens are kept exact
beside their codes, in a ring. Nothing is coded twice, so any way of cutting the input into chunks gives the same cache.

Layers are stacked on a leading axis. Layers named in `exact_layers` form a second stack, which is not compressed.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Integer

from jaxquant import _cache, _stacks
from jaxquant._kernels import cuda_encode, nvrtc
from jaxquant._stacks import Index, KVCache, Stack, Store, resolve
from jaxquant.protocols import Quantizer
from jaxquant.quantizers import Exact

T = TypeVar("T")
Implementation = Literal["xla", "cuda"]


def init(
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
    """Allocate an empty cache.

    Args:
        keys: quantizer of the keys; `quantizers.Exact` for an uncompressed cache. One for all layers, or a sequence
            with one for each: layers whose quantizers differ in their numbers alone share a stack. The arrays of a
            layer's own quantizer may have the kv_heads as their first axis.
        values: likewise for the values, of the same dim.
        layers: of the model.
        batch: rows.
        kv_heads: heads of the keys and values (not of the queries).
        capacity: most tokens a row can hold. Tokens appended beyond it are dropped.
        sinks: tokens at the start of a row that stay exact.
        window: newest tokens that stay exact.
        exact_layers: layers that are not compressed; negative numbers count from the end.
        dtype: of the tokens kept exact, and of the exact layers.

    Raises:
        ValueError: a size is out of range, or the quantizers' dims differ.

    Example:
        >>> from jaxquant.methods import turboquant
        >>> k, v = turboquant.kv(jax.random.key(0), dim=128, bits_k=4, bits_v=2)
        >>> init(k, v, layers=2, batch=1, kv_heads=8, capacity=1024).bytes_per_token
        100.0
    """
    for name, size in {"layers": layers, "batch": batch, "kv_heads": kv_heads, "capacity": capacity}.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if not 0 <= sinks < capacity:
        raise ValueError(f"sinks must be from 0 to capacity - 1 = {capacity - 1}, got {sinks}")
    if window < 0:
        raise ValueError(f"window must not be negative, got {window}")
    each = _stacks.each_layer("keys", keys, layers), _stacks.each_layer("values", values, layers)
    dims = [sorted({quantizer.dim for quantizer in half}) for half in each]
    if len({*dims[0], *dims[1]}) > 1:
        raise ValueError(
            f"keys and values must have the same dim, got {' and '.join(', '.join(map(str, dim)) for dim in dims)}"
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be a floating dtype, got {jnp.dtype(dtype).name}")
    outside = [layer for layer in exact_layers if not -layers <= layer < layers]
    if outside:
        raise ValueError(f"exact_layers must be from {-layers} to {layers - 1}, got {outside}")

    float_name = jnp.dtype(dtype).name
    exact = {layer % layers for layer in exact_layers}
    alike: dict[Any, list[int]] = {}
    for layer in sorted(set(range(layers)) - exact):
        own = [half[layer] for half, given in zip(each, (keys, values), strict=True) if isinstance(given, Sequence)]
        alike.setdefault(tuple(map(_stacks.form, own)), []).append(layer)
    whole = Exact(dim=dims[0][0], dtype=float_name)  # pyright: ignore[reportArgumentType]
    shape = (batch, kv_heads, capacity)
    stacks, members = [], [*alike.values()]
    for layers_of_one in members:
        halves = [_stacks.joined([half[layer] for layer in layers_of_one]) for half in each]
        stacks.append(_stacks.stack(halves, len(layers_of_one), shape, float_name, sinks=sinks, window=window))
    if exact:
        members.append(sorted(exact))
        stacks.append(_stacks.stack([whole, whole], len(exact), shape, float_name))
    places = {layer: (i, j) for i, group in enumerate(members) for j, layer in enumerate(group)}
    return KVCache(
        stacks=tuple(stacks),
        length=jnp.zeros((layers, batch), jnp.int32),
        exact_from=jnp.zeros((layers, batch), jnp.int32),
        places=tuple(places[layer] for layer in range(layers)),
    )


def append(
    cache: KVCache,
    layer: Index,
    k: Float[Array, "batch new kv_heads dim"],
    v: Float[Array, "batch new kv_heads dim"],
    *,
    mask: Bool[Array, "batch new"] | None = None,
    implementation: Implementation | None = None,
) -> KVCache:
    """Add tokens to the end of every row of one layer.

    Inside a jitted step that donates the cache, the buffers are updated in place.

    Args:
        cache: to add to.
        layer: a Python integer, or an integer array when it is not known at trace time (as in `lax.scan`).
        k: keys, as attention will read them (after any position encoding).
        v: values.
        mask: False marks padding, anywhere in the row; such tokens are not stored.
        implementation: "xla" runs everywhere; "cuda" codes and writes in one kernel, on an NVIDIA GPU; None takes
            "cuda" where it can code for this cache, and "xla" elsewhere.

    Raises:
        ValueError: a shape does not fit the cache, `layer` is out of range, or the implementation that was asked for
            cannot code for this cache.

    Example:
        >>> from jaxquant.quantizers import Exact
        >>> c = init(Exact(dim=64), Exact(dim=64), layers=1, batch=1, kv_heads=2, capacity=16)
        >>> append(c, 0, jnp.ones((1, 3, 2, 64)), jnp.ones((1, 3, 2, 64))).length
        Array([[3]], dtype=int32)
    """
    expected = (cache.batch, k.shape[1] if k.ndim == 4 else "new", cache.kv_heads, cache.dim)
    for name, x in {"k": k, "v": v}.items():
        if x.shape != expected:
            raise ValueError(
                f"{name} must have shape [batch, new, kv_heads, dim] = {list(expected)}, got {list(x.shape)}"
            )
    if mask is not None and mask.shape != k.shape[:2]:
        raise ValueError(f"mask must have shape [batch, new] = {list(k.shape[:2])}, got {list(mask.shape)}")
    return _cache.append(cache, *resolve(cache, layer), k, v, mask, _choose(implementation, cache))


def _choose(implementation: Implementation | None, cache: KVCache) -> tuple[tuple[bool, bool], ...]:
    """Say for the keys and values of each stack whether the fused kernel codes them."""
    if implementation not in (None, "xla", "cuda"):
        raise ValueError(f"implementation must be None, 'xla' or 'cuda', got {implementation!r}")
    if implementation == "xla" or (implementation is None and not nvrtc.available()):
        return ((False, False),) * len(cache.stacks)
    stores = [(stack.keys, stack.values) for stack in cache.stacks]
    obstacles = [[cuda_encode.unsupported(store) for store in pair] for pair in stores]
    if implementation == "cuda" and all(obstacle for pair in obstacles for obstacle in pair):
        raise ValueError(f"implementation 'cuda' cannot code for this cache: {obstacles[0][0]}")
    return tuple((not keys, not values) for keys, values in obstacles)


def materialize(
    cache: KVCache, layer: Index
) -> tuple[Float[Array, "batch capacity kv_heads dim"], Float[Array, "batch capacity kv_heads dim"]]:
    """Decode one layer: the keys and values that attention reads for the next token, in float32.

    Positions from `length` on are zero. This is for inspection and tests: attention itself never does it.

    Raises:
        ValueError: the tokens of the cache are dealt out to devices; `sharding.joined` gives one whose are not.

    Example:
        >>> from jaxquant.quantizers import Exact
        >>> c = init(Exact(dim=64), Exact(dim=64), layers=1, batch=1, kv_heads=2, capacity=16)
        >>> k, v = materialize(c, 0)
        >>> k.shape
        (1, 16, 2, 64)
    """
    if cache.spread is not None:
        raise ValueError("cache has its tokens dealt out to devices: give sharding.joined(cache)")
    return _cache.materialize(cache, *resolve(cache, layer))


@jax.jit
def crop(cache: KVCache, length: int | Integer[Array, "*batch"]) -> KVCache:
    """Forget every token from position `length` on, in all layers: for rejected drafts and edited prompts.

    Tokens that had left the exact window are read from their codes from now on.

    Args:
        cache: to shorten.
        length: tokens to keep, one number or one a row; rows that are shorter stay as they are.

    Raises:
        ValueError: there is neither one length nor one a row.

    Example:
        >>> from jaxquant.quantizers import Exact
        >>> c = init(Exact(dim=64), Exact(dim=64), layers=1, batch=2, kv_heads=2, capacity=16)
        >>> c = append(c, 0, jnp.ones((2, 3, 2, 64)), jnp.ones((2, 3, 2, 64)))
        >>> crop(c, jnp.array([1, 9])).length
        Array([[1, 3]], dtype=int32)
    """
    if jnp.shape(length) not in ((), (cache.batch,)):
        raise ValueError(f"length must be one number or {cache.batch}, one a row, got shape {list(jnp.shape(length))}")
    kept = jnp.clip(jnp.asarray(length, jnp.int32), 0, cache.length)
    window = max(stack.window for stack in cache.stacks)
    in_window = jnp.maximum(cache.exact_from, cache.length - window)
    exact_from = jnp.where(kept < cache.length, jnp.minimum(in_window, kept), cache.exact_from)
    return _stacks.renewed(dataclasses.replace(cache, length=kept, exact_from=exact_from))


@jax.jit
def reorder(cache: KVCache, rows: Integer[Array, " rows"]) -> KVCache:
    """Take rows of the batch in a new order, with repetition or omission: for beams, forks and finished sequences.

    Args:
        cache: to take from.
        rows: indices into the batch, clamped to it; the new batch has as many rows.

    Example:
        >>> from jaxquant.quantizers import Exact
        >>> c = init(Exact(dim=64), Exact(dim=64), layers=1, batch=2, kv_heads=2, capacity=16)
        >>> reorder(c, jnp.array([0, 0, 0, 1])).batch
        4
    """

    def taken(tree: T) -> T:
        return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=1, mode="clip"), tree)

    def store(old: Store) -> Store:
        return Store(quantizer=old.quantizer, codes=taken(old.codes), sinks=taken(old.sinks), window=taken(old.window))

    stacks = tuple(Stack(keys=store(stack.keys), values=store(stack.values)) for stack in cache.stacks)
    length, exact_from = taken(cache.length), taken(cache.exact_from)
    return _stacks.renewed(dataclasses.replace(cache, stacks=stacks, length=length, exact_from=exact_from))


def fork(cache: KVCache, *, copies: int) -> KVCache:
    """Repeat every row: continue one prefix in several ways.

    Raises:
        ValueError: `copies` is less than 1.

    Example:
        >>> from jaxquant.quantizers import Exact
        >>> c = init(Exact(dim=64), Exact(dim=64), layers=1, batch=2, kv_heads=2, capacity=16)
        >>> fork(c, copies=3).batch
        6
    """
    if copies < 1:
        raise ValueError(f"copies must be at least 1, got {copies}")
    return reorder(cache, jnp.repeat(jnp.arange(cache.batch, dtype=jnp.int32), copies))
