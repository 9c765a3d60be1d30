"""How a pipeline works on one layer: tokens arrive, are attended to exactly, and leave in blocks for the strategy."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxquant._pytree import pytree, static
from jaxquant.protocols import (
    AttentiveScorer,
    Context,
    Monitor,
    Observation,
    Quantizer,
    RankedStrategy,
    Scorer,
    Strategy,
)
from jaxquant.strategies import Append, rows_where

Number = float | Float[Array, ""]


@pytree
class Pipeline:
    """What happens to tokens that leave the exact window.

    Attributes:
        keys: quantizer of the keys; with `Append`, it may code the tokens of a block together.
        values: likewise of the values.
        strategy: decides what is stored.
        scorer: says how much tokens matter, to strategies that ask.
        monitor: moves the threshold.
        threshold: score from which a token gets what is scarce, where no monitor has said anything yet.
        block: tokens that leave the window together.
    """

    keys: Quantizer
    values: Quantizer
    strategy: Strategy = Append()
    scorer: Scorer | None = None
    monitor: Monitor | None = None
    threshold: Number = -float("inf")
    block: int = static(default=32)


@pytree
class State:
    """What a pipeline holds of its layers; every leaf is [layers, batch, ...].

    Attributes:
        sinks: exact keys and values of the first tokens, [layers, batch, kv_heads, sinks, dim].
        recent: exact keys and values of the tokens that did not leave yet, oldest first, [..., window + block, dim].
        length: tokens that came.
        start: position of the oldest recent token.
        store: storage of the strategy.
        scorer: state of the scorer, or None.
        received: attention that recent tokens received, where the scorer watches attention.
        monitor: state of the monitor, or None.
        threshold: of the strategy.
        entropy: of attention since the monitor looked last: sum, and queries.
    """

    sinks: tuple[Array, Array]
    recent: tuple[Array, Array]
    length: Int[Array, "*layers batch"]
    start: Int[Array, "*layers batch"]
    store: PyTree[Any]
    scorer: PyTree[Any]
    received: Float[Array, "*layers batch kv_heads recent"] | None
    monitor: PyTree[Any]
    threshold: Float[Array, "*layers batch"]
    entropy: Float[Array, "*layers batch 2"] | None


class Rule(NamedTuple):
    """How scores are formed, and how far back a query sees."""

    scale: Float[Array, ""]
    soft_cap: Float[Array, ""] | None
    sliding_window: Int[Array, ""] | None


class Segment(NamedTuple):
    """Tokens of every row, as many as fit before the next block leaves; the first `count` of a row count."""

    q: Float[Array, "batch size heads dim"]
    k: Float[Array, "batch size kv_heads dim"]
    v: Float[Array, "batch size kv_heads dim"]
    count: Int[Array, " batch"]


@jax.jit
def attend(
    pipeline: Pipeline,
    states: State,
    capacity: Int[Array, ""],
    layer: Int[Array, ""],
    index: Int[Array, ""],
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    rule: Rule,
) -> tuple[Array, Array, State]:
    """Append tokens to the state at `index`, as many at a time as fit before a block leaves, and attend from them."""
    batch, new = q.shape[:2]
    state = jax.tree.map(lambda leaf: leaf[index], states)
    total = jnp.full(batch, new, jnp.int32)
    order = jnp.broadcast_to(jnp.arange(new, dtype=jnp.int32), (batch, new))
    if mask is not None:  # tokens first, padding last
        order = jnp.argsort(~mask, axis=1, stable=True).astype(jnp.int32)
        total = jnp.sum(mask, axis=1, dtype=jnp.int32)
    total = jnp.minimum(total, capacity - state.length)
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
    size = min(new, pipeline.block)

    def segment(carry: tuple[State, Array, Array, Array], _: None) -> tuple[tuple[State, Array, Array, Array], None]:
        state, taken, out, lse = carry
        state = _leave(pipeline, state, total > taken, layer)
        rank = taken[:, None] + jnp.arange(size, dtype=jnp.int32)
        token = jnp.take_along_axis(order, jnp.minimum(rank, new - 1), axis=1)
        room = state.start + state.recent[0].shape[2] - state.length
        count = jnp.clip(jnp.minimum(total - taken, room), 0, size)
        part = Segment(q[rows, token], k[rows, token], v[rows, token], count)
        some, log, state = _step(pipeline, _arrived(state, part), part, rule)
        token = jnp.where(rank < (taken + count)[:, None], token, new)
        out = out.at[rows, token].set(some.astype(out.dtype), mode="drop")
        return (state, taken + count, out, lse.at[rows, token].set(log, mode="drop")), None

    start = (state, jnp.zeros_like(total), jnp.zeros_like(q), jnp.full(q.shape[:3], -jnp.inf, jnp.float32))
    # A row may have room for as little as one token at first, and for a block from then on.
    steps = 1 + -(-(new - 1) // pipeline.block) if new else 0
    if steps == 1:
        (state, _, out, lse), _ = segment(start, None)
    else:
        (state, _, out, lse), _ = lax.scan(segment, start, None, length=steps)
    return out, lse, jax.tree.map(lambda leaf, new: leaf.at[index].set(new), states, state)


def _leave(pipeline: Pipeline, state: State, more: Bool[Array, " batch"], layer: Int[Array, ""]) -> State:
    """Hand the oldest block of the rows that are full, and to which more will come, to the strategy."""
    size, block = state.recent[0].shape[2], pipeline.block
    full = more & (state.length - state.start == size)

    def left(state: State) -> State:
        k, v = (jnp.nan_to_num(x[:, :, :block].astype(jnp.float32)) for x in state.recent)
        scorer, scores, received = state.scorer, None, state.received
        if pipeline.scorer is not None:
            mass = None if received is None else received[:, :, :block]
            ctx = Context(layer=layer, step=state.start, values=v, received=mass)
            scorer, scores = pipeline.scorer.score(scorer, k, ctx)
        pair = pipeline.keys, pipeline.values
        store = pipeline.strategy.store(state.store, pair, k, v, scores, state.start, state.threshold)
        recent = jax.tree.map(lambda x: jnp.roll(x, -block, axis=2), state.recent)
        if received is not None:
            received = jnp.roll(received, -block, axis=2).at[:, :, size - block :].set(0.0)
        after = dataclasses.replace(
            state, start=state.start + block, store=store, scorer=scorer, recent=recent, received=received
        )
        return rows_where(full, after, state)

    return lax.cond(jnp.any(full), left, lambda state: state, state)


def _arrived(state: State, part: Segment) -> State:
    """Keep new tokens exactly."""
    batch, size = part.k.shape[:2]
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
    rank = jnp.arange(size, dtype=jnp.int32)
    position = state.length[:, None] + rank

    def put(buffer: Array, x: Array, slot: Array) -> Array:
        slot = jnp.where((rank < part.count[:, None]) & (slot >= 0), slot, buffer.shape[2])
        return buffer.at[rows, :, slot].set(x.astype(buffer.dtype), mode="drop")

    return dataclasses.replace(
        state,
        sinks=tuple(put(buffer, x, position) for buffer, x in zip(state.sinks, (part.k, part.v), strict=True)),
        recent=tuple(
            put(buffer, x, position - state.start[:, None])
            for buffer, x in zip(state.recent, (part.k, part.v), strict=True)
        ),
        length=state.length + part.count,
    )


def _step(pipeline: Pipeline, state: State, part: Segment, rule: Rule) -> tuple[Array, Array, State]:
    """Attend from new tokens, which were kept already, and let scorer and monitor watch."""
    batch, size, heads, dim = part.q.shape
    kv_heads, sinks = part.k.shape[2], state.sinks[0].shape[2]
    group = heads // kv_heads
    q = jnp.moveaxis(part.q.astype(jnp.float32).reshape(batch, size, kv_heads, group, dim), 1, 3)
    pair = pipeline.keys, pipeline.values
    held = pipeline.strategy.read(state.store, pair, (q * rule.scale).reshape(batch, kv_heads, group * size, dim))
    entries = held.k.shape[2]
    k, v = (
        jnp.concatenate([jnp.nan_to_num(x.astype(jnp.float32)) for x in (first, middle, last)], axis=2)
        for first, middle, last in zip(state.sinks, held[:2], state.recent, strict=True)
    )
    recent = state.start[:, None] + jnp.arange(state.recent[0].shape[2], dtype=jnp.int32)
    first = jnp.broadcast_to(jnp.arange(sinks, dtype=jnp.int32), (batch, sinks))
    exact = [jnp.where(x < state.length[:, None], x, -1)[:, None] for x in (first, recent)]
    shape = (batch, held.position.shape[1])
    position = jnp.concatenate(
        [
            jnp.broadcast_to(exact[0], (*shape, sinks)),
            held.position,
            jnp.broadcast_to(exact[1], (*shape, recent.shape[1])),
        ],
        axis=2,
    )
    valid = jnp.arange(size, dtype=jnp.int32) < part.count[:, None]
    query = jnp.where(valid, (state.length - part.count)[:, None] + jnp.arange(size, dtype=jnp.int32), -1)
    seen = (position[:, :, None] >= 0) & (position[:, :, None] <= query[:, None, :, None])
    if rule.sliding_window is not None:
        seen &= position[:, :, None] > query[:, None, :, None] - rule.sliding_window
    bias = jnp.zeros((1, 1, 1, 1, 1), jnp.float32)
    if held.weight is not None:
        weight = held.weight.reshape(batch, kv_heads, -1, size if held.weight.shape[2] > 1 else 1, entries)
        bias = jnp.pad(weight, [(0, 0)] * 4 + [(sinks, recent.shape[1])])

    out, lse, weights = _softmax(q, k, v, seen[:, :, None], bias, rule)
    if isinstance(pipeline.scorer, AttentiveScorer):
        assert state.received is not None
        stored = jnp.zeros((batch, kv_heads, entries), jnp.float32) if held.score is None else held.score
        scorer, scores = pipeline.scorer.attend(
            state.scorer,
            jnp.concatenate([stored, state.received], axis=2),
            jnp.mean(weights, axis=2)[..., sinks:],
            jnp.mean(q, axis=2),
            valid,
        )
        store = state.store
        if isinstance(pipeline.strategy, RankedStrategy):
            store = pipeline.strategy.rescore(store, scores[..., :entries])
        state = dataclasses.replace(state, scorer=scorer, store=store, received=scores[..., entries:])
    if pipeline.monitor is not None:
        assert state.entropy is not None
        each = -jnp.sum(weights * jnp.log(jnp.where(weights > 0, weights, 1.0)), axis=-1)
        each = jnp.where(valid, jnp.mean(each, axis=(1, 2)), 0.0)
        entropy = state.entropy + jnp.stack([jnp.sum(each, axis=1), part.count.astype(jnp.float32)], axis=1)

        last = jnp.maximum(part.count - 1, 0)[:, None, None, None, None]

        def newest(x: Array) -> Array:
            return x if x.shape[3] == 1 else jnp.take_along_axis(x, last, axis=3)

        def response(query: Array) -> Array:
            at = newest(jnp.broadcast_to(seen[:, :, None], (batch, seen.shape[1], 1, *seen.shape[2:])))
            return _softmax(query[:, :, None, None], k, v, at, newest(bias[:, :, :1]), rule)[0][:, :, 0, 0]

        here = newest(q[:, :, :1])[:, :, 0, 0]
        observation = Observation(
            entropy=entropy[:, 0] / jnp.maximum(entropy[:, 1], 1.0),
            pushforward=lambda change: jax.jvp(response, (here,), (change,))[1],
        )
        base = jnp.full(batch, pipeline.threshold, jnp.float32)
        monitor, threshold = pipeline.monitor.observe(state.monitor, observation, base)
        full = (part.count > 0) & (state.length - state.start == recent.shape[1])
        state = dataclasses.replace(
            state,
            monitor=rows_where(full, monitor, state.monitor),
            threshold=jnp.where(full, threshold, state.threshold),
            entropy=rows_where(full, jnp.zeros_like(entropy), entropy),
        )
    out = jnp.moveaxis(out, 3, 1).reshape(batch, size, heads, dim)
    return out, jnp.moveaxis(lse, 3, 1).reshape(batch, size, heads), state


def _softmax(q: Array, k: Array, v: Array, seen: Array, bias: Array, rule: Rule) -> tuple[Array, Array, Array]:
    """Attend: output [..., queries, dim], log-sum-exp [..., queries] and weights [..., queries, entries]."""
    scores = jnp.einsum("bhgnd,bhtd->bhgnt", q * rule.scale, k, precision="highest")
    if rule.soft_cap is not None:
        scores = rule.soft_cap * jnp.tanh(scores / rule.soft_cap)
    scores = jnp.where(seen, scores + bias, -jnp.inf)
    peak = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(peak), peak, 0.0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1.0)
    out = jnp.einsum("bhgnt,bhtd->bhgnd", weights, v, precision="highest")
    return out, (peak + jnp.log(jnp.where(total > 0, total, 1.0)))[..., 0], weights
