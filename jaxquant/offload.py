"""Old codes in host memory: a context larger than the device's memory.

The newest tokens are in an ordinary cache on the device. `spill` moves the oldest coded ones, a segment at a time, to
host memory (JAX's memory kind "pinned_host"), packed as they are. Attention reads the cold segments one after the
other: while it reads one, the next is on its way, and of all of them only two are ever on the device.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import SingleDeviceSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Integer, PyTree

from jaxquant import _attention, attention, cache
from jaxquant._kernels import xla
from jaxquant._pytree import pytree
from jaxquant._stacks import KVCache, Stack, Store
from jaxquant.attention import Number
from jaxquant.protocols import Quantizer


@pytree
class OffloadedCache:
    """A cache whose oldest tokens are in host memory; decoders extend it like any other.

    Attributes:
        hot: the first `sinks` tokens and the newest ones, on the device.
        cold: codes of keys and of values in host memory, every leaf [layers, segments + 1,
            batch, kv_heads, segment, ...]; the last segment is for what is thrown away.
        spilled: segments of each row that are in use.
        length: tokens of each row, cold ones included.
    """

    hot: KVCache
    cold: tuple[PyTree[Any], PyTree[Any]]
    spilled: Int[Array, " batch"]
    length: Int[Array, "layers batch"]

    @property
    def segment(self) -> int:
        """Tokens of a segment."""
        return jax.tree.leaves(self.cold)[0].shape[4]

    @property
    def dim(self) -> int:
        """Length of a key or value vector."""
        return self.hot.dim

    @property
    def capacity(self) -> int:
        """Most tokens a row can hold, if it is spilled in time."""
        return self.hot.capacity + (jax.tree.leaves(self.cold)[0].shape[1] - 1) * self.segment

    @property
    def host_nbytes(self) -> int:
        """Bytes in host memory."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.cold))

    @property
    def nbytes(self) -> int:
        """Bytes held, in both memories."""
        return self.host_nbytes + self.hot.nbytes + self.spilled.nbytes + self.length.nbytes

    @property
    def bytes_per_token(self) -> float:
        """Bytes of key and value for each token of capacity and kv head, in both memories."""
        heads = self.hot.layers * self.hot.batch * self.hot.kv_heads
        return (self.hot.bytes_per_token * heads * self.hot.capacity + self.host_nbytes) / (heads * self.capacity)

    def room(self) -> int:
        """Count the tokens that can be appended before the fullest row has to be spilled; waits for the device."""
        return self.hot.capacity - int(jnp.max(self.hot.length))

    def attend(
        self,
        q: Float[Array, "batch new heads dim"],
        k: Float[Array, "batch new kv_heads dim"],
        v: Float[Array, "batch new kv_heads dim"],
        layer: int,
        *,
        mask: Bool[Array, "batch new"] | None = None,
        scale: Number | None = None,
        soft_cap: Number | None = None,
        sliding_window: int | Integer[Array, ""] | None = None,
    ) -> tuple[Float[Array, "batch new heads dim"], Float[Array, "batch new heads"], "OffloadedCache"]:
        """Append tokens to one layer and attend causally from each of them: see `attention.attend`.

        Raises:
            ValueError: there are sinks and a sliding window, whose distance the device no longer knows.
        """
        if sliding_window is not None and self.hot.stacks[0].sinks:
            raise ValueError("sliding_window cannot be had together with sinks in an offloaded cache")
        rule = {"scale": scale, "soft_cap": soft_cap, "sliding_window": sliding_window}
        before = self.hot.length[layer]
        if q.shape[1] == 1:
            hot = cache.append(self.hot, layer, k, v, mask=mask)
            out, lse = (x[:, None] for x in attention.decode_attention(q[:, 0], hot, layer, **rule))
        else:
            out, lse, hot = attention.prefill_attention(q, k, v, self.hot, layer, mask=mask, **rule)
        seen = _cold(self, q, before, mask, layer, rule)
        joined = attention.merge((out.astype(jnp.float32), lse), seen)
        length = self.length.at[layer].set(hot.length[layer] + self.spilled * self.segment)
        return joined[0].astype(q.dtype), joined[1], dataclasses.replace(self, hot=hot, length=length)


def init(
    keys: Quantizer | Sequence[Quantizer],
    values: Quantizer | Sequence[Quantizer],
    *,
    layers: int,
    batch: int,
    kv_heads: int,
    capacity: int,
    hot: int,
    segment: int = 1024,
    sinks: int = 0,
    window: int = 0,
    dtype: DTypeLike = jnp.bfloat16,
) -> OffloadedCache:
    """Allocate an empty cache in both memories.

    Args:
        keys: see `cache.init`; quantizers of layers may differ in their numbers alone.
        values: see `cache.init`.
        layers: of the model.
        batch: rows.
        kv_heads: heads of the keys and values.
        capacity: most tokens of a row; room is made for whole segments.
        hot: most tokens of a row on the device.
        segment: tokens that are moved, and read, at a time; a multiple of the window.
        sinks: first tokens of a row that stay exact, and on the device.
        window: newest tokens that stay exact.
        dtype: of the tokens kept exact.

    Raises:
        ValueError: a size is out of range.

    Example:
        >>> from jaxquant.methods import turboquant
        >>> k, v = turboquant.kv(jax.random.key(0), dim=64, bits_k=4, bits_v=2)
        >>> c = init(k, v, layers=1, batch=1, kv_heads=2, capacity=4096, hot=512, segment=256)
        >>> jax.tree.leaves(c.cold)[0].sharding.memory_kind
        'pinned_host'
    """
    if segment < 1 or (window and segment % window):
        raise ValueError(f"segment must be a positive multiple of the window of {window}, got {segment}")
    least = sinks + window + segment
    if not least <= hot <= capacity:
        raise ValueError(f"hot must be from sinks + window + segment = {least} to capacity = {capacity}, got {hot}")
    near = cache.init(
        keys, values, layers=layers, batch=batch, kv_heads=kv_heads, capacity=hot, sinks=sinks, window=window,
        dtype=dtype,
    )  # fmt: skip
    if len(near.stacks) > 1:
        raise ValueError("keys and values must have one form in all layers to be offloaded")
    count = -(-(capacity - hot) // segment)
    host = _host(near)

    def empty(leaf: Array) -> Array:
        shape = (layers, count + 1, batch, kv_heads, segment, *leaf.shape[4:])
        return jax.device_put(np.zeros(shape, leaf.dtype), host)

    stack = next(iter(near.stacks))
    cold = jax.tree.map(empty, (stack.keys.codes, stack.values.codes))
    return OffloadedCache(
        hot=near, cold=cold, spilled=jnp.zeros(batch, jnp.int32), length=jnp.zeros((layers, batch), jnp.int32)
    )


def spill(held: OffloadedCache) -> OffloadedCache:
    """Move the oldest segment of every row that has one outside its window to the host. The cache is donated.

    Rows that are shorter, and rows whose host memory is full, stay as they are.

    Example:
        >>> from jaxquant.methods import turboquant
        >>> k, v = turboquant.kv(jax.random.key(0), dim=64, bits_k=4, bits_v=2)
        >>> c = init(k, v, layers=1, batch=1, kv_heads=2, capacity=128, hot=64, segment=32)
        >>> x = jnp.ones((1, 40, 2, 64))
        >>> c = spill(c.attend(x, x, x, 0)[2])
        >>> c.hot.length, c.length
        (Array([[8]], dtype=int32), Array([[40]], dtype=int32))
    """
    (hot, spilled), cold = _spilling(_host(held.hot))(held.hot, held.cold, held.spilled)
    return OffloadedCache(hot=hot, cold=cold, spilled=spilled, length=held.length)


@functools.cache
def _spilling(host: SingleDeviceSharding) -> Any:
    return jax.jit(_spill, donate_argnums=(0, 1), out_shardings=(None, host))


def _spill(hot: KVCache, cold: Any, spilled: Array) -> tuple[tuple[KVCache, Array], Any]:
    stack = hot.stacks[0]
    segment, count = jax.tree.leaves(cold)[0].shape[4], jax.tree.leaves(cold)[0].shape[1]
    count -= 1
    coded = jnp.min(hot.length, axis=0) - stack.sinks - stack.window
    moves = (coded >= segment) & (spilled < count)
    place = jnp.where(moves, spilled, count)  # the segment beyond the last is never read

    def moved(far: Array, near: Array) -> Array:
        oldest = jax.device_put(near[:, None, :, :, :segment], jax.memory.Space.Host)
        for row in range(spilled.shape[0]):
            begin = (0, place[row], row, *(0,) * (far.ndim - 3))
            begin = tuple(jnp.asarray(i, jnp.int32) for i in begin)
            far = lax.dynamic_update_slice(far, oldest[:, :, row : row + 1], begin)
        return far

    def shifted(near: Array) -> Array:
        return jnp.where(
            moves[None, :, *(None,) * (near.ndim - 2)], jnp.roll(near, -segment, axis=3), near
        )  # what comes around is beyond the length

    stores = (stack.keys, stack.values)
    far = tuple(jax.tree.map(moved, old, store.codes) for old, store in zip(cold, stores, strict=True))
    keys, values = (dataclasses.replace(store, codes=jax.tree.map(shifted, store.codes)) for store in stores)
    less = moves.astype(jnp.int32) * segment
    after = dataclasses.replace(
        hot, stacks=(Stack(keys=keys, values=values),), length=hot.length - less,
        exact_from=jnp.maximum(hot.exact_from - less, 0),
    )  # fmt: skip
    return (after, spilled + moves.astype(jnp.int32)), far


@functools.partial(jax.jit, static_argnames="layer")
def _cold(
    held: OffloadedCache, q: Array, before: Array, mask: Array | None, layer: int, rule: dict[str, Any]
) -> tuple[Array, Array]:
    """Attend to the segments on the host, the next of which is fetched before one is read."""
    stack, segment, batch, new = held.hot.stacks[0], held.segment, q.shape[0], q.shape[1]
    kv_heads, spilled = held.hot.kv_heads, held.spilled
    valid = jnp.ones((batch, new), bool) if mask is None else mask
    position = before[:, None] + jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1 + spilled[:, None] * segment
    where = _attention.repeated(jnp.where(valid, position, -1), q.shape[2] // kv_heads)
    rows, known = _attention.rows_of(q, kv_heads), _attention.rule_of(held.dim, **rule)
    never, last = jnp.zeros(batch, jnp.int32), jax.tree.leaves(held.cold)[0].shape[1] - 1
    nothing = jnp.zeros((1, batch, kv_heads, 0, held.dim), jnp.float32)

    def fetched(number: Array) -> Any:
        def leaf(far: Array) -> Array:
            begin = tuple(jnp.asarray(i, jnp.int32) for i in (layer, number, *(0,) * (far.ndim - 2)))
            part = lax.dynamic_slice(far, begin, (1, 1, *far.shape[2:]))
            return jax.device_put(part, jax.memory.Space.Device)[0]

        return jax.tree.map(leaf, held.cold)

    def decoded(number: Array, parts: list[Store]) -> xla.Partial:
        length = jnp.where((number < spilled) & valid[:, 0], segment, 0)[None]
        alone = KVCache(
            stacks=(Stack(keys=parts[0], values=parts[1]),),
            length=length,
            exact_from=jnp.zeros_like(length),
            places=((0, 0),),
        )
        out, lse = attention.decode_attention(q[:, 0].astype(jnp.float32), alone, 0, **rule)
        out, lse = (_attention.rows_of(x[:, None], kv_heads) for x in (out, lse[..., None]))
        return xla.Partial(out, lse[..., 0])

    def scored(number: Array, parts: list[Store]) -> xla.Partial:
        relative = where - stack.sinks - number * segment
        relative = jnp.where((jnp.tile(number < spilled[:, None], where.shape[1])) & (where >= 0), relative, -1)
        return xla.coded(Stack(keys=parts[0], values=parts[1]), jnp.int32(0), rows, relative, never, known)

    def read(number: Array, codes: Any) -> xla.Partial:
        parts = [
            Store(quantizer=store.at(layer), codes=code, sinks=nothing, window=nothing)
            for store, code in zip((stack.keys, stack.values), codes, strict=True)
        ]
        if new > 1 or known.sliding_window is not None:
            return scored(number, parts)
        return decoded(number, parts)

    def body(number: Array, carry: tuple[Any, xla.Partial]) -> tuple[Any, xla.Partial]:
        codes, joined = carry
        following = fetched(jnp.minimum(number + 1, last))
        return following, xla.merge([joined, read(number, codes)])

    start = xla.Partial(jnp.zeros_like(rows), jnp.full(rows.shape[:-1], -jnp.inf, jnp.float32))
    _, (out, lse) = lax.fori_loop(0, jnp.max(spilled), body, (fetched(jnp.int32(0)), start))
    return _attention.heads_of(out, new), _attention.heads_of(lse[..., None], new)[..., 0]


def _host(near: KVCache) -> SingleDeviceSharding:
    device = next(iter(jax.tree.leaves(near.stacks)[0].devices()))
    return SingleDeviceSharding(device, memory_kind="pinned_host")
