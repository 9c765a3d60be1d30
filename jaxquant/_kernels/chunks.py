"""Attention of plain arrays in chunks of queries and of keys, with its backward pass.

A chunk of queries meets a chunk of keys at a time, under an online softmax. The last chunk overlaps the one before it
rather than being shorter; the backward pass counts what they share once.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Integer


class Static(NamedTuple):
    """What decides the program."""

    causal: bool
    q_chunk: int
    kv_chunk: int


class Hiding(NamedTuple):
    """What hides keys from queries, beside causality."""

    offset: Int[Array, " batch"]
    window: Int[Array, ""] | None
    prefix: Int[Array, " batch"] | None
    q_mask: Bool[Array, "batch queries"] | None
    kv_mask: Bool[Array, "batch keys"] | None
    segments: tuple[Integer[Array, "batch queries"], Integer[Array, "batch keys"]] | None
    mask: Bool[Array, "#batch #heads #queries #keys"] | None


class Smooth(NamedTuple):
    """What scores depend on beside queries and keys."""

    scale: Float[Array, ""]
    soft_cap: Float[Array, ""] | None
    bias: Float[Array, "#batch #heads #queries #keys"] | None


class _Block(NamedTuple):
    """One chunk of queries against one chunk of keys."""

    products: Float[Array, "batch kv_heads group q k"]
    bounded: Float[Array, "batch kv_heads group q k"]
    scores: Float[Array, "batch kv_heads group q k"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: Static, q: Array, k: Array, v: Array, smooth: Smooth, hiding: Hiding) -> tuple[Array, Array]:
    wide = smooth.scale.dtype

    def chunk(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        first = _first(i, static.q_chunk, q.shape[1])
        queries = _queries(q, static, hiding, first, k.shape[2])

        def step(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            peak, total, acc = carry
            _, values, block = _block(static, queries, k, v, smooth, hiding, first, j)
            new_peak = jnp.maximum(peak, jnp.max(block.scores, axis=-1))
            safe = _finite(new_peak)
            weights, decay = jnp.exp(block.scores - safe[..., None]), jnp.exp(peak - safe)
            mixed = _product("bhgqk,bkhd->bhgqd", weights.astype(v.dtype), values, wide)
            return new_peak, total * decay + jnp.sum(weights, axis=-1), acc * decay[..., None] + mixed

        shape = (q.shape[0], *queries.shape[1:4])
        start = (jnp.full(shape, -jnp.inf, wide), jnp.zeros(shape, wide), jnp.zeros((*shape, v.shape[3]), wide))
        peak, total, acc = lax.fori_loop(*_visited(static, hiding, first, k.shape[1]), step, start)
        some = total > 0
        divisor = jnp.where(some, total, jnp.ones_like(total))
        lse = jnp.where(some, peak + jnp.log(divisor), -jnp.inf)
        out = _heads((acc / divisor[..., None]).astype(q.dtype))
        out = lax.dynamic_update_slice_in_dim(carry[0], out, first, axis=1)
        return out, lax.dynamic_update_slice_in_dim(carry[1], _heads(lse[..., None])[..., 0], first, axis=1)

    out, lse = jnp.zeros((*q.shape[:3], v.shape[3]), q.dtype), jnp.zeros(q.shape[:3], wide)
    return lax.fori_loop(0, -(-q.shape[1] // static.q_chunk), chunk, (out, lse))


def _forward(static: Static, *arguments: Any) -> tuple[tuple[Array, Array], Any]:
    results: Any = _attend(static, *arguments)
    return results, (*arguments, *results)


def _backward(static: Static, saved: Any, cotangents: tuple[Array, Array]) -> tuple[Any, ...]:
    q, k, v, smooth, hiding, out, lse = saved
    d_out, d_lse = cotangents
    wide = smooth.scale.dtype
    # Both of the row's sums that a score's derivative needs: through the normalisation, and through the returned lse.
    slope = jnp.sum(d_out.astype(wide) * out.astype(wide), axis=-1) - d_lse

    def chunk(i: Array, carry: Any) -> Any:
        d_q, d_k, d_v, d_smooth = carry
        first = _first(i, static.q_chunk, q.shape[1])
        cut = functools.partial(_rows, first=first, size=static.q_chunk, kv_heads=k.shape[2])
        queries, outs = _queries(q, static, hiding, first, k.shape[2]), cut(d_out)
        slopes, norms = (cut(x[..., None])[..., 0] for x in (slope, lse))
        fresh = first + jnp.arange(static.q_chunk, dtype=jnp.int32) >= i * static.q_chunk  # not of the chunk before

        def step(j: Array, carry: Any) -> Any:
            d_rows, d_k, d_v, d_smooth = carry
            keys, values, block = _block(static, queries, k, v, smooth, hiding, first, j)
            weights = jnp.exp(block.scores - _finite(norms)[..., None])
            weights = jnp.where(fresh[:, None], weights, jnp.zeros_like(weights))
            d_weights = _product("bhgqd,bkhd->bhgqk", outs, values, wide)
            d_scores = weights * (d_weights - slopes[..., None])
            d_products, d_smooth = _through_scores(d_scores, block, smooth, d_smooth, first, j, static, k.shape[1])
            narrow = d_products.astype(q.dtype)
            d_rows = d_rows + _product("bhgqk,bkhd->bhgqd", narrow, keys, wide)
            start = _first(j, static.kv_chunk, k.shape[1])
            d_k = _add(d_k, _product("bhgqk,bhgqd->bkhd", narrow, queries, wide), start, axis=1)
            d_v = _add(d_v, _product("bhgqk,bhgqd->bkhd", weights.astype(v.dtype), outs, wide), start, axis=1)
            return d_rows, d_k, d_v, d_smooth

        bounds = _visited(static, hiding, first, k.shape[1])
        start = jnp.zeros(queries.shape, wide)
        d_rows, d_k, d_v, d_smooth = lax.fori_loop(*bounds, step, (start, d_k, d_v, d_smooth))
        return _add(d_q, _heads(d_rows), first, axis=1), d_k, d_v, d_smooth

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, wide), (q, k, v, smooth))
    found = lax.fori_loop(0, -(-q.shape[1] // static.q_chunk), chunk, zeros)
    d_q, d_k, d_v, d_smooth = jax.tree.map(lambda d, x: d.astype(x.dtype), found, (q, k, v, smooth))
    if hiding.kv_mask is not None:
        d_k, d_v = (jnp.where(hiding.kv_mask[:, :, None, None], x, jnp.zeros_like(x)) for x in (d_k, d_v))
    return d_q, d_k, d_v, d_smooth, None


_attend.defvjp(_forward, _backward)
attend = jax.jit(_attend, static_argnums=0)


def _block(
    static: Static, queries: Array, k: Array, v: Array, smooth: Smooth, hiding: Hiding, first: Array, j: Array
) -> tuple[Array, Array, _Block]:
    """Give a chunk of keys and values, and their scores; -inf where hidden."""
    start, size = _first(j, static.kv_chunk, k.shape[1]), static.kv_chunk
    keys, values = (lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in (k, v))
    if hiding.kv_mask is not None:
        real = lax.dynamic_slice_in_dim(hiding.kv_mask, start, size, axis=1)[:, :, None, None]
        keys, values = (jnp.where(real, x, jnp.zeros_like(x)) for x in (keys, values))
    products = _product("bhgqd,bkhd->bhgqk", queries, keys, smooth.scale.dtype)
    bounded = scores = products * smooth.scale
    if smooth.soft_cap is not None:
        bounded = jnp.tanh(scores / smooth.soft_cap)
        scores = smooth.soft_cap * bounded
    window = functools.partial(_window, first=first, start=start, static=static, kv_heads=k.shape[2])
    if smooth.bias is not None:
        scores = scores + window(smooth.bias).astype(scores.dtype)
    column = start + jnp.arange(size, dtype=jnp.int32)
    seen = _sees(static, hiding, first, column)[:, None, None] & (column >= j * size)  # not of the chunk before
    if hiding.mask is not None:
        seen = seen & window(hiding.mask)
    return keys, values, _Block(products, bounded, jnp.where(seen, scores, -jnp.inf))


def _sees(static: Static, hiding: Hiding, first: Array, column: Int[Array, " k"]) -> Bool[Array, "batch q k"]:
    row = first + jnp.arange(static.q_chunk, dtype=jnp.int32)
    position = (hiding.offset[:, None] + row)[:, :, None]
    seen = jnp.ones((*position.shape[:2], column.shape[0]), bool)
    if static.causal:
        seen = column <= position
        if hiding.prefix is not None:
            seen |= column < hiding.prefix[:, None, None]
    if hiding.window is not None:
        seen &= jnp.abs(column - position) < hiding.window
    start = column[0]
    if hiding.q_mask is not None:
        seen &= lax.dynamic_slice_in_dim(hiding.q_mask, first, static.q_chunk, axis=1)[:, :, None]
    if hiding.kv_mask is not None:
        seen &= lax.dynamic_slice_in_dim(hiding.kv_mask, start, static.kv_chunk, axis=1)[:, None, :]
    if hiding.segments is not None:
        of_q = lax.dynamic_slice_in_dim(hiding.segments[0], first, static.q_chunk, axis=1)
        of_k = lax.dynamic_slice_in_dim(hiding.segments[1], start, static.kv_chunk, axis=1)
        seen &= of_q[:, :, None] == of_k[:, None, :]
    return seen


def _through_scores(
    d_scores: Array, block: _Block, smooth: Smooth, d_smooth: Smooth, first: Array, j: Array, static: Static, keys: int
) -> tuple[Array, Smooth]:
    """Carry the scores' derivative back to the products of queries and keys, and add to those of the numbers."""
    d_bias, d_cap = d_smooth.bias, d_smooth.soft_cap
    if d_bias is not None:
        part = d_scores.reshape(d_scores.shape[0], -1, *d_scores.shape[3:])
        part = jnp.sum(part, axis=[i for i in range(4) if d_bias.shape[i] == 1], keepdims=True)
        starts = (0, 0, first, _first(j, static.kv_chunk, keys))
        at = tuple(jnp.asarray(i if size > 1 else 0, jnp.int32) for i, size in zip(starts, d_bias.shape, strict=True))
        d_bias = lax.dynamic_update_slice(d_bias, lax.dynamic_slice(d_bias, at, part.shape) + part, at)
    if smooth.soft_cap is not None and d_cap is not None:
        slope = 1 - jnp.square(block.bounded)
        along = block.bounded - block.products * smooth.scale / smooth.soft_cap * slope
        d_cap = d_cap + jnp.sum(d_scores * along)
        d_scores = d_scores * slope
    numbers = Smooth(scale=d_smooth.scale + jnp.sum(d_scores * block.products), soft_cap=d_cap, bias=d_bias)
    return d_scores * smooth.scale, numbers


def _visited(static: Static, hiding: Hiding, first: Array, keys: int) -> tuple[Array, Array]:
    """Give the range of chunks of keys of which some query of a chunk may see something."""
    low, high = jnp.int32(0), jnp.int32(keys)
    oldest, newest = jnp.min(hiding.offset) + first, jnp.max(hiding.offset) + first + static.q_chunk - 1
    if static.causal:
        high = newest + 1
        if hiding.prefix is not None:
            high = jnp.maximum(high, jnp.max(hiding.prefix))
    if hiding.window is not None:
        low, high = oldest - hiding.window + 1, jnp.minimum(high, newest + hiding.window)
    low, high = jnp.clip(low, 0, keys), jnp.clip(high, 0, keys)
    return low // static.kv_chunk, -(-high // static.kv_chunk)


def _first(i: Array, size: int, length: int) -> Int[Array, ""]:
    """Give the start of a chunk; the last one overlaps the one before it rather than being shorter."""
    return jnp.minimum(i * size, length - size).astype(jnp.int32)


def _queries(q: Array, static: Static, hiding: Hiding, first: Array, kv_heads: int) -> Array:
    rows = _rows(q, first, static.q_chunk, kv_heads)
    if hiding.q_mask is None:
        return rows
    real = lax.dynamic_slice_in_dim(hiding.q_mask, first, static.q_chunk, axis=1)[:, None, None, :, None]
    return jnp.where(real, rows, jnp.zeros_like(rows))


def _rows(x: Array, first: Array, size: int, kv_heads: int) -> Float[Array, "batch kv_heads group q last"]:
    part = lax.dynamic_slice_in_dim(x, first, size, axis=1)
    part = part.reshape(*part.shape[:2], kv_heads, part.shape[2] // kv_heads, part.shape[3])
    return jnp.moveaxis(part, 1, 3)


def _heads(rows: Float[Array, "batch kv_heads group q last"]) -> Float[Array, "batch q heads last"]:
    rows = jnp.moveaxis(rows, 3, 1)
    return rows.reshape(*rows.shape[:2], -1, rows.shape[4])


def _window(x: Array, *, first: Array, start: Array, static: Static, kv_heads: int) -> Array:
    """Cut an array of [batch, heads, queries, keys], each of which may be 1, to a chunk, with heads in groups."""
    for axis, at, size in ((2, first, static.q_chunk), (3, start, static.kv_chunk)):
        x = x if x.shape[axis] == 1 else lax.dynamic_slice_in_dim(x, at, size, axis=axis)
    return x[:, None] if x.shape[1] == 1 else x.reshape(x.shape[0], kv_heads, -1, *x.shape[2:])


def _add(whole: Array, part: Array, start: Array, *, axis: int) -> Array:
    held = lax.dynamic_slice_in_dim(whole, start, part.shape[axis], axis=axis)
    return lax.dynamic_update_slice_in_dim(whole, held + part, start, axis=axis)


def _product(subscripts: str, x: Array, y: Array, dtype: Any) -> Array:
    return jnp.einsum(subscripts, x, y, precision="highest", preferred_element_type=dtype)


def _finite(x: Array) -> Array:
    return jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))
