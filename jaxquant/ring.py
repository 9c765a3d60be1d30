"""Ring attention over codes: a long prompt is read by all devices at once, and what travels is packed.

Every device codes its own tokens. Then it attends from them to the codes it has, passes those on to its neighbour, and
goes on with what it gets, until it has seen the codes of all. Nobody ever holds more than its own codes and those in
transit, and a token costs on every hop what it costs in the cache: 100 bytes a kv head of 128 with K4/V2 instead of
512.

References:
    H. Liu, M. Zaharia, P. Abbeel, "Ring attention with blockwise transformers for near-infinite context",
    arXiv:2310.01889; W. Brandon et al., "Striped attention: faster ring attention for causal transformers",
    arXiv:2311.09431, for dealing tokens out in turn.

Differs from the papers: codes travel and not keys and values, and stripes are pages of tokens.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Integer, PyTree

from jaxquant import _attention
from jaxquant._kernels import xla
from jaxquant._placement import mapped
from jaxquant._spread import Spread
from jaxquant._stacks import Index, KVCache, Stack, resolve, switch
from jaxquant.attention import Number
from jaxquant.cache import append
from jaxquant.sharding import Layout, specs


def prefill_attention(
    layout: Layout,
    q: Float[Array, "batch new heads dim"],
    k: Float[Array, "batch new kv_heads dim"],
    v: Float[Array, "batch new kv_heads dim"],
    cache: KVCache,
    layer: int,
    *,
    scale: Number | None = None,
    soft_cap: Number | None = None,
    sliding_window: int | Integer[Array, ""] | None = None,
) -> tuple[Float[Array, "batch new heads dim"], Float[Array, "batch new heads"], KVCache]:
    """Fill one layer of an empty cache with a prompt and attend causally from each token.

    Queries, keys and values are the caller's own shards: with `order(layout, cache, new)` as the order of tokens, they
    are sharded along the tokens (`PartitionSpec(batch, tokens, kv_heads)`), so that no device ever has the prompt.

    Args:
        layout: whose tokens go along an axis.
        q: queries, tokens in that order.
        k: keys, after any position encoding, likewise.
        v: values.
        cache: from `sharding.init`, without sinks and window, with nothing in this layer.
        layer: of the cache.
        scale: of the scores before the softmax; dim**-0.5 if None.
        soft_cap: bound of the scores.
        sliding_window: newest tokens that may be seen, the query's own included; all if None.

    Returns:
        The output and the natural log-sum-exp, tokens in the order of q, and the cache, as `append` would have left it.

    Raises:
        ValueError: the layout does not deal tokens out, the cache keeps tokens exact, or `new` is not a multiple of
            the page times the devices.

    Example:
        >>> from jaxquant import sharding
        >>> from jaxquant.methods import turboquant
        >>> layout = Layout(jax.make_mesh((1,), ("tokens",)), tokens="tokens", page=8)
        >>> keys, values = turboquant.kv(jax.random.key(0), dim=64, bits_k=4, bits_v=4)
        >>> held = sharding.init(layout, keys, values, layers=1, batch=1, kv_heads=2, capacity=64)
        >>> x = jnp.ones((1, 16, 2, 64))
        >>> out, lse, held = prefill_attention(layout, x, x, x, held, 0)
        >>> out.shape, held.length
        ((1, 16, 2, 64), Array([[16]], dtype=int32))
    """
    spread = _spread(layout, cache, k.shape[1])
    rule = _attention.rule_of(cache.dim, scale, soft_cap, sliding_window)
    return _mapped(layout, spread, layer, q, k, v, cache, rule)


def order(layout: Layout, cache: KVCache, new: int) -> Integer[Array, " new"]:
    """Give the position of each token of a prompt in the order in which devices have them.

    `tokens[order(...)]` deals a prompt out, and the same numbers are its positions for a rotary embedding.

    Example:
        >>> from jaxquant import sharding
        >>> from jaxquant.quantizers import Exact
        >>> layout = Layout(jax.make_mesh((1,), ("tokens",)), tokens="tokens", page=8)
        >>> exact = Exact(dim=64)
        >>> held = sharding.init(layout, exact, exact, layers=1, batch=1, kv_heads=2, capacity=64)
        >>> order(layout, held, 8).tolist()
        [0, 1, 2, 3, 4, 5, 6, 7]
    """
    spread = _spread(layout, cache, new)
    slots = jnp.arange(new // spread.devices, dtype=jnp.int32)
    return jnp.concatenate([spread.token(slots, jnp.int32(device)) for device in range(spread.devices)])


def _spread(layout: Layout, cache: KVCache, new: int) -> Spread:
    spread = cache.spread
    if spread is None or layout.tokens is None:
        raise ValueError("layout must name an axis for tokens, and cache must come from sharding.init with it")
    if any(stack.sinks or stack.window for stack in cache.stacks):
        raise ValueError("cache must keep no sinks and no window")
    if not new or new % (spread.page * spread.devices) or new > spread.slots:
        raise ValueError(
            f"q must hold a multiple of page x devices = {spread.page * spread.devices} tokens, at most "
            f"{spread.slots}, got {new}"
        )
    return spread


@functools.partial(jax.jit, static_argnames=("layout", "spread", "layer"))
def _mapped(layout: Layout, spread: Spread, layer: int, q: Array, k: Array, v: Array, cache: KVCache, rule: xla.Rule):
    rows, own = PartitionSpec(layout.batch, layout.tokens, layout.kv_heads), specs(layout, cache)
    everywhere = jax.tree.map(lambda _: PartitionSpec(), rule)
    local = functools.partial(_local, spread, layer)
    over = mapped(layout, local, (rows, rows, rows, own, everywhere), (rows, rows, own))
    return over(q, k, v, cache, rule)


def _local(
    spread: Spread, layer: int, q: Array, k: Array, v: Array, cache: KVCache, rule: xla.Rule
) -> tuple[Array, Array, KVCache]:
    new, devices = k.shape[1], spread.devices
    me = lax.axis_index(spread.axis)
    position = jnp.broadcast_to(spread.token(jnp.arange(new, dtype=jnp.int32)), q.shape[:2])
    # Slots of a device are in the order of its tokens: without a spread, `append` fills them one after the other.
    filled = append(dataclasses.replace(cache, spread=None), layer, k, v)
    after = dataclasses.replace(filled, length=filled.length.at[layer].set(new * devices), spread=spread)
    neighbour = [(i, (i + 1) % devices) for i in range(devices)]

    def attend(which: int, index: Index) -> tuple[Array, Array]:
        held = after.stacks[which]
        kv_heads = held.keys.sinks.shape[2]
        rows = _attention.rows_of(q, kv_heads)
        where = _attention.repeated(position, q.shape[2] // kv_heads)
        never = jnp.zeros(q.shape[0], jnp.int32)

        def cut(leaf: Array) -> Array:
            return lax.dynamic_slice_in_dim(leaf, jnp.asarray(index, jnp.int32), 1)[:, :, :, :new]

        def seen(hop: Array, codes: tuple[PyTree[Any], PyTree[Any]]) -> xla.Partial:
            keys, values = (
                dataclasses.replace(store, quantizer=store.at(index), codes=code)
                for store, code in zip((held.keys, held.values), codes, strict=True)
            )
            origin = (me - hop) % devices
            short = Stack(keys=keys, values=values)
            return xla.coded(short, jnp.int32(0), rows, where, never, rule, spread=spread, device=origin)

        def hop(number: Array, carry: tuple[Any, xla.Partial]) -> tuple[Any, xla.Partial]:
            codes, joined = carry
            passed = jax.tree.map(lambda leaf: lax.ppermute(leaf, spread.axis, neighbour), codes)
            return passed, xla.merge([joined, seen(number, passed)])

        codes = jax.tree.map(cut, (held.keys.codes, held.values.codes))
        _, (out, lse) = lax.fori_loop(1, devices, hop, (codes, seen(jnp.int32(0), codes)))
        return _attention.heads_of(out, new).astype(q.dtype), _attention.heads_of(lse[..., None], new)[..., 0]

    out, lse = switch(after, *resolve(cache, layer), attend)
    return out, lse, after
