"""Attention over one layer of a cache, compiled: what `attention` calls when it has checked its arguments.

Coded tokens, sinks and the exact window are three sets of tokens, attended apart and joined by their log-sum-exp.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxquant import _stacks
from jaxquant._kernels import cuda, flash, pallas, xla
from jaxquant._stacks import Index, KVCache, Stack, switch

_QUERY_CHUNK = 256  # tokens of a prefill chunk that are scored at a time
_FAR = 2**30  # a sliding window beyond every row


@functools.partial(jax.jit, static_argnames=("stack", "chosen"))
def decode(
    cache: KVCache, layer: Index, stack: int | None, q: Array, rule: xla.Rule, chosen: tuple[str, ...]
) -> tuple[Array, Array]:
    """Attend from queries [batch, heads, dim]; give outputs likewise, and log-sum-exps [batch, heads].

    `stack` is the one that has the layer, None where that is known at run time only; `chosen` names an implementation
    for every stack.
    """
    length, exact_from = cache.length[layer], cache.exact_from[layer]
    position = length[:, None] - 1

    def attend(which: int, index: Index) -> tuple[Array, Array]:
        held = cache.stacks[which]
        queries = rows_of(q[:, None], held.keys.sinks.shape[2])
        where = repeated(position, q.shape[1] // held.keys.sinks.shape[2])
        if chosen[which] == "cuda":
            exact = held.sinks or held.window or cache.spread is not None  # parts are joined in float32
            fused = q.astype(jnp.float32) if exact else q
            parts = [cuda.coded(held, index, fused, layer, cache.length, cache.exact_from, rule, cache.spread)]
        elif chosen[which] == "pallas":
            parts = [pallas.coded(held, index, queries, where, exact_from, rule)]
        else:
            parts = [xla.coded(held, index, queries, where, exact_from, rule, spread=cache.spread)]
        if cache.spread is not None:
            parts = xla.gathered(parts[0], cache.spread)
        parts += _sinks(held, index, queries, where, rule)
        if held.window:
            token = _stacks.ring_positions(length, held.window)
            token = jnp.where((token >= exact_from[:, None]) & (token >= held.sinks), token, -1)
            keys, values = held.keys.window[index], held.values.window[index]
            parts.append(xla.exact(queries, keys, values, where, token, rule))
        out, lse = xla.merge(parts)
        return heads_of(out, 1)[:, 0].astype(q.dtype), heads_of(lse[..., None], 1)[:, 0, :, 0]

    return switch(cache, layer, stack, attend)


@functools.partial(jax.jit, static_argnames=("stack", "exact", "chosen", "span"))
def prefill(
    before: KVCache,
    after: KVCache,
    layer: Index,
    stack: int | None,
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    rule: xla.Rule,
    exact: bool,
    chosen: tuple[str, ...],
    span: int | None,
) -> tuple[Array, Array]:
    """Attend from a chunk, queries [batch, new, heads, dim], keys and values [batch, new, kv_heads, dim].

    `before` and `after` are the cache without and with the chunk; `exact` reads its own tokens as they are given, and
    `span` is the sliding window where it is known before tracing. Outputs are [batch, new, heads, dim], log-sum-exps
    [batch, new, heads]; the rest is as in `decode`.
    """
    new = q.shape[1]
    start, exact_from = before.length[layer], before.exact_from[layer]
    order = None
    if mask is not None:  # tokens first, padding last: positions then run without gaps
        order = jnp.argsort(~mask, axis=1, stable=True)
        q, k, v = (jnp.take_along_axis(x, order[:, :, None, None], axis=1) for x in (q, k, v))
    count = after.length[layer] - start
    rank = jnp.arange(new, dtype=jnp.int32)
    position = jnp.where(rank < count[:, None], start[:, None] + rank, -1)

    def attend(which: int, index: Index) -> tuple[Array, Array]:
        held, old = after.stacks[which], before.stacks[which]
        kv_heads = held.keys.sinks.shape[2]
        # Entry e of the band is the token at position start - window + e.
        banded = exact or held.window
        band = [_band(old, index, start, x, i) for i, x in enumerate((k, v))] if banded else []
        if chosen[which] == "flash":
            queries, where = rows_of(q, kv_heads), repeated(position, q.shape[2] // kv_heads)
            held_by_row = (start, count, exact_from)
            parts = flash.attend(held, index, queries, v, band, *held_by_row, rule, exact=exact, span=span)
            out, lse = xla.merge(parts + _sinks(held, index, queries, where, rule))
            return heads_of(out, new).astype(q.dtype), heads_of(lse[..., None], new)[..., 0]

        def chunk(first: Int[Array, ""], size: int) -> tuple[Array, Array]:
            where = repeated(lax.dynamic_slice_in_dim(position, first, size, axis=1), q.shape[2] // kv_heads)
            queries = rows_of(lax.dynamic_slice_in_dim(q, first, size, axis=1), kv_heads)
            newest = jnp.minimum(where, start[:, None] - 1) if exact else where
            parts = [xla.coded(held, index, queries, where, exact_from, rule, newest=newest, spread=after.spread)]
            if after.spread is not None:
                parts = xla.gathered(parts[0], after.spread)
            parts += _sinks(held, index, queries, where, rule)
            if banded:
                span = new + held.window if exact else size + held.window
                begin = 0 if exact else first
                token = (start - held.window + begin)[:, None] + jnp.arange(span, dtype=jnp.int32)
                known = (token >= exact_from[:, None]) & (token >= held.sinks)
                token = jnp.where(known, token, -1)
                if exact:
                    parts.append(xla.recent(queries, band[0], band[1], where, token, rule, first + size + held.window))
                else:
                    keys, values = (lax.dynamic_slice_in_dim(x, first, span, axis=2) for x in band)
                    parts.append(xla.exact(queries, keys, values, where, token, rule, window=held.window))
            out, lse = xla.merge(parts)
            return heads_of(out, size).astype(q.dtype), heads_of(lse[..., None], size)[..., 0]

        if new <= _QUERY_CHUNK:
            return chunk(jnp.int32(0), new)
        steps = jnp.minimum(jnp.arange(-(-new // _QUERY_CHUNK), dtype=jnp.int32) * _QUERY_CHUNK, new - _QUERY_CHUNK)
        out, lse = lax.map(lambda first: chunk(first, _QUERY_CHUNK), steps)
        return _joined(out, new), _joined(lse, new)

    out, lse = switch(before, layer, stack, attend)
    if mask is None:
        return out, lse
    assert order is not None
    back = jnp.argsort(order, axis=1)
    return jnp.take_along_axis(out, back[:, :, None, None], axis=1), jnp.take_along_axis(lse, back[:, :, None], axis=1)


def _sinks(held: Stack, index: Index, queries: Array, where: Array, rule: xla.Rule) -> list[xla.Partial]:
    if not held.sinks:
        return []
    token = jnp.broadcast_to(jnp.arange(held.sinks, dtype=jnp.int32), (queries.shape[0], held.sinks))
    return [xla.exact(queries, held.keys.sinks[index], held.values.sinks[index], where, token, rule)]


def _band(old: Stack, index: Index, start: Array, x: Array, which: int) -> Array:
    """Line up the window as it was before the chunk with the chunk itself: [batch, kv_heads, window + new, dim]."""
    new = jnp.swapaxes(x, 1, 2)
    if not old.window:
        return new
    ring = (old.keys, old.values)[which].window
    slot = (start[:, None] - old.window + jnp.arange(old.window, dtype=jnp.int32)) % old.window
    past = jnp.take_along_axis(ring[index], slot[:, None, :, None], axis=2)
    return jnp.concatenate([past, new.astype(ring.dtype)], axis=2)


def rule_of(dim: int, scale: Any, soft_cap: Any, sliding_window: Any, visible: Array | None = None) -> xla.Rule:
    """Say what a query sees, and how it is scored.

    Raises:
        ValueError: a number that is known before tracing is out of range.
    """
    if isinstance(soft_cap, int | float | np.number) and not soft_cap > 0:
        raise ValueError(f"soft_cap must be positive, got {soft_cap}")
    if isinstance(sliding_window, int | np.integer) and sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1, got {sliding_window}")
    if sliding_window is not None:  # so that distances from it do not overflow
        smaller = min if isinstance(sliding_window, int | np.integer) else jnp.minimum
        sliding_window = jnp.asarray(smaller(sliding_window, _FAR), jnp.int32)
    return xla.Rule(
        scale=jnp.asarray(dim**-0.5 if scale is None else scale, jnp.float32),
        soft_cap=None if soft_cap is None else jnp.asarray(soft_cap, jnp.float32),
        sliding_window=sliding_window,
        visible=visible,
    )


def rows_of(q: Float[Array, "batch new heads dim"], kv_heads: int) -> Float[Array, "batch kv_heads rows dim"]:
    """Line up the queries that read one kv head."""
    batch, new, heads, dim = q.shape
    rows = q.reshape(batch, new, kv_heads, heads // kv_heads, dim).astype(jnp.float32)
    return jnp.moveaxis(rows, 1, 3).reshape(batch, kv_heads, -1, dim)


def heads_of(rows: Float[Array, "batch kv_heads rows last"], new: int) -> Float[Array, "batch new heads last"]:
    """Undo `rows_of`."""
    batch, kv_heads, _, last = rows.shape
    return jnp.moveaxis(rows.reshape(batch, kv_heads, -1, new, last), 3, 1).reshape(batch, new, -1, last)


def repeated(position: Int[Array, "batch new"], group: int) -> Int[Array, "batch rows"]:
    """Give the position of each row of `rows_of`, where `group` query heads share a kv head."""
    return jnp.tile(position, (1, group))


def _joined(steps: Array, new: int) -> Array:
    """Join chunks of queries along tokens; the last chunk overlaps the one before it."""
    count, size = steps.shape[0], steps.shape[2]
    whole = jnp.moveaxis(steps[:-1], 0, 1)
    whole = whole.reshape(whole.shape[0], (count - 1) * size, *whole.shape[3:])
    return jnp.concatenate([whole, steps[-1][:, size - (new - (count - 1) * size) :]], axis=1)
