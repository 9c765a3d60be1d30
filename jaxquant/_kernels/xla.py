"""Attention over a stack in plain JAX: any quantizer, any platform, and the oracle for every other backend.

Queries come as rows [batch, kv_heads, rows, dim]: the heads that share a kv head, times the tokens. `position` gives
each row's place in its sequence (negative: padding, sees nothing). `coded` and `exact` return a `Partial`, attention
over a part of the tokens, and `merge` joins parts as if all scores had gone through one softmax.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxquant._spread import Spread
from jaxquant._stacks import Index, Stack, Store
from jaxquant.protocols import Quantizer

BLOCK = 512  # tokens decoded at a time: the only part of the cache that ever exists in float32


class Partial(NamedTuple):
    """Attention over some of the tokens: the normalized output, and the log of the sum of exponentials."""

    out: Float[Array, "batch kv_heads rows dim"]
    lse: Float[Array, "batch kv_heads rows"]


class Rule(NamedTuple):
    """What a row may see, and how scores are formed, beside causality."""

    scale: Float[Array, ""]
    soft_cap: Float[Array, ""] | None
    sliding_window: Int[Array, ""] | None
    visible: Bool[Array, "batch capacity"] | None


def coded(
    stack: Stack,
    index: Index,
    q: Float[Array, "batch kv_heads rows dim"],
    position: Int[Array, "batch rows"],
    exact_from: Int[Array, " batch"],
    rule: Rule,
    *,
    newest: Int[Array, "batch rows"] | None = None,
    spread: Spread | None = None,
    device: Int[Array, ""] | None = None,
) -> Partial:
    """Attend to the coded tokens, a block at a time, with an online softmax.

    The query is projected once and the output restored once; the loop looks codes up and multiplies. A token that a row
    reads from the exact window, which ends with `newest` (the row's own position if None), is left out for that row,
    as is every token after it. With a `spread`, the stack holds what it deals to `device` (this one if None).
    """
    newest = position if newest is None else newest
    block = min(BLOCK, stack.slots)
    keys, values = stack.keys.at(index), stack.values.at(index)
    projected = keys.project(q * rule.scale)
    width = jax.eval_shape(lambda store: expand(values, store, index, 0, block), stack.values).shape[-1]

    def block_of(i: Int[Array, ""]) -> tuple[Array, Array]:
        start = jnp.minimum(i * block, stack.slots - block)
        slot = start + jnp.arange(block, dtype=jnp.int32)
        token = (slot if spread is None else spread.token(slot, device)) + stack.sinks
        scores = _cap(_scores(projected, expand(keys, stack.keys, index, start, block)), rule.soft_cap)
        seen = _sees(position, token, rule, start + stack.sinks if spread is None else None)
        seen &= token <= newest[:, :, None]
        in_window = token > (newest[:, :, None] - stack.window)
        seen &= ~in_window | (token < exact_from[:, None, None])
        seen &= slot >= i * block  # the last block overlaps the one before it
        return jnp.where(seen[:, None], scores, -jnp.inf), expand(values, stack.values, index, start, block)

    def before(token: Int[Array, ""]) -> Int[Array, ""]:
        slot = token - stack.sinks
        return jnp.clip(slot if spread is None else spread.before(slot, device), 0, stack.slots)

    stop = before(jnp.max(newest) + 1)
    first = jnp.int32(0)
    if rule.sliding_window is not None:
        oldest = jnp.min(jnp.where(position < 0, jnp.iinfo(jnp.int32).max, position))
        first = before(oldest - rule.sliding_window + 1) // block
    peak, total, acc = _online((*projected.shape[:-1], width), first, -(-stop // block), block_of)
    return _normalize(peak, total, values.restore(acc))


def recent(
    q: Float[Array, "batch kv_heads rows dim"],
    k: Float[Array, "batch kv_heads tokens dim"],
    v: Float[Array, "batch kv_heads tokens dim"],
    position: Int[Array, "batch rows"],
    token: Int[Array, "batch tokens"],
    rule: Rule,
    stop: Int[Array, ""],
) -> Partial:
    """Attend as `exact` does to the first `stop` of many tokens, a block at a time."""
    count = k.shape[2]
    block = min(BLOCK, count)
    q = q.astype(jnp.float32) * rule.scale

    def block_of(i: Int[Array, ""]) -> tuple[Array, Array]:
        start = jnp.minimum(i * block, count - block)
        keys, values = (
            jnp.nan_to_num(lax.dynamic_slice_in_dim(x, start, block, axis=2).astype(jnp.float32)) for x in (k, v)
        )
        place = lax.dynamic_slice_in_dim(token, start, block, axis=1)
        seen = _sees(position, place[:, None, :], rule, None) & (place >= 0)[:, None, :]
        seen &= start + jnp.arange(block, dtype=jnp.int32) >= i * block
        return jnp.where(seen[:, None], _cap(_scores(q, keys), rule.soft_cap), -jnp.inf), values

    return _normalize(*_online(q.shape, jnp.int32(0), -(-stop // block), block_of))


def _online(
    shape: tuple[int, ...],
    first: Int[Array, ""],
    stop: Int[Array, ""],
    block_of: Callable[[Int[Array, ""]], tuple[Array, Array]],
) -> tuple[Array, Array, Array]:
    """Pass blocks of (masked scores, values) through one softmax: its peak, its sum, and the weighted sum of values."""

    def body(i: Int[Array, ""], carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        peak, total, acc = carry
        scores, values = block_of(i)
        new_peak = jnp.maximum(peak, jnp.max(scores, axis=-1))
        safe = jnp.where(jnp.isfinite(new_peak), new_peak, 0.0)
        weights = jnp.exp(scores - safe[..., None])
        decay = jnp.exp(peak - safe)
        return new_peak, total * decay + jnp.sum(weights, axis=-1), acc * decay[..., None] + _mix(weights, values)

    start = (
        jnp.full(shape[:-1], -jnp.inf, jnp.float32),
        jnp.zeros(shape[:-1], jnp.float32),
        jnp.zeros(shape, jnp.float32),
    )
    return lax.fori_loop(first, stop, body, start)


def exact(
    q: Float[Array, "batch kv_heads rows dim"],
    k: Float[Array, "batch kv_heads tokens dim"],
    v: Float[Array, "batch kv_heads tokens dim"],
    position: Int[Array, "batch rows"],
    token: Int[Array, "batch tokens"],
    rule: Rule,
    *,
    window: int | None = None,
) -> Partial:
    """Attend to exact tokens at the positions `token` (negative: none there), all at once.

    Args:
        q: rows of queries.
        k: keys.
        v: values.
        position: of each row.
        token: position of each key and value.
        rule: see `Rule`.
        window: where given, a row sees only the newest `window` tokens up to its own.
    """
    k, v = (jnp.nan_to_num(x.astype(jnp.float32)) for x in (k, v))  # a weight of 0 would not hide a NaN
    scores = _cap(_scores(q.astype(jnp.float32) * rule.scale, k), rule.soft_cap)
    seen = _sees(position, token[:, None, :], rule, None) & (token >= 0)[:, None, :]
    if window is not None:
        seen &= token[:, None, :] > (position[:, :, None] - window)
    scores = jnp.where(seen[:, None], scores, -jnp.inf)
    peak = jnp.max(scores, axis=-1, initial=-jnp.inf)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(peak), peak, 0.0)[..., None])
    return _normalize(peak, jnp.sum(weights, axis=-1), _mix(weights, v))


def gathered(part: Partial, spread: Spread) -> list[Partial]:
    """Give the parts of all devices that share a row, by one collective."""
    both = spread.gathered(jnp.concatenate([part.out, part.lse[..., None]], axis=-1))
    return [Partial(each[..., :-1], each[..., -1]) for each in both]


def merge(parts: list[Partial]) -> Partial:
    """Join attention over disjoint sets of tokens."""
    if len(parts) == 1:
        return parts[0]
    each = jnp.stack([part.lse for part in parts])
    lse = jax.nn.logsumexp(each, axis=0)
    weights = jnp.exp(each - jnp.where(jnp.isfinite(lse), lse, 0.0))
    return Partial(sum(w[..., None] * part.out for w, part in zip(weights, parts, strict=True)), lse)  # pyright: ignore


def expand(
    quantizer: Quantizer, store: Store, index: Index, start: Index, block: int
) -> Float[Array, "batch kv_heads block width"]:
    """Decode `block` tokens of a layer from slot `start` on, in the coordinates of the code."""

    def cut(leaf: Array) -> Array:
        begin = (index, 0, 0, start, *(0,) * (leaf.ndim - 4))
        begin = tuple(jnp.asarray(i, jnp.int32) for i in begin)
        return lax.dynamic_slice(leaf, begin, (1, *leaf.shape[1:3], block, *leaf.shape[4:]))[0]

    return quantizer.expand(jax.tree.map(cut, store.codes))


def _scores(q: Array, k: Array) -> Float[Array, "batch kv_heads rows tokens"]:
    return jnp.einsum("bhrd,bhtd->bhrt", q, k, precision="highest")


def _mix(weights: Array, v: Array) -> Float[Array, "batch kv_heads rows width"]:
    return jnp.einsum("bhrt,bhtd->bhrd", weights, v, precision="highest")


def _cap(scores: Array, soft_cap: Array | None) -> Array:
    return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)


def _sees(
    position: Int[Array, "batch rows"], token: Int[Array, "*tokens"], rule: Rule, start: Int[Array, ""] | None
) -> Bool[Array, "batch rows tokens"]:
    """Say which tokens each row may see; `start` is the first of a contiguous run of tokens, if they are one."""
    seen = token <= position[:, :, None]
    if rule.sliding_window is not None:
        seen &= token > position[:, :, None] - rule.sliding_window
    if rule.visible is not None:
        if start is not None:
            visible = lax.dynamic_slice_in_dim(rule.visible, start, token.shape[-1], axis=1)[:, None]
        else:
            at = jnp.broadcast_to(jnp.maximum(token, 0), (position.shape[0], 1, token.shape[-1]))
            visible = jnp.take_along_axis(rule.visible[:, None], at, axis=2, mode="clip")
        seen &= visible
    return seen


def _normalize(peak: Array, total: Array, out: Array) -> Partial:
    some = total > 0
    safe = jnp.where(some, total, 1.0)
    return Partial(out / safe[..., None], jnp.where(some, peak + jnp.log(safe), -jnp.inf))
