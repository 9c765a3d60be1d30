"""What every Pallas grid does with a block of tokens: decode tiles of bytes, score, weigh, add. Plain jnp on values.

A byte holds codes of several planes, half a vector apart or less (see `packing`). Rather than bring the codes into
order, the query is cut into the same planes before the loop, and the output put together after it. Tokens run along the
columns of keys and the rows of values, queries along the last axis of everything else.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxquant import packing

Operand = Literal["float16", "float32"]
Lookup = Callable[[list[Array], int], Array]

LOG2E = float(np.log2(np.e))
_SELECTED = 4  # up to here levels are picked by a tree of 2**bits - 1 selects; beyond, from a table in memory


class Code(NamedTuple):
    """The static part of keys or values: `dim` codes of `bits` bits, read as tiles of `width` lanes."""

    dim: int
    bits: int
    width: int

    @property
    def fields(self) -> tuple[int, ...]:
        """Widths of the fields that a code is split into, low bits first; the first is the widest."""
        return packing._fields(self.bits)

    @property
    def planes(self) -> int:
        """Planes of the first field."""
        return 8 // self.fields[0]

    @property
    def span(self) -> int:
        """Codes of one of these planes: the lanes of a tile that count."""
        return self.dim // self.planes


class Setting(NamedTuple):
    """All that is static: another value is another kernel."""

    keys: Code
    values: Code
    rows: int
    block: int
    page: int | None
    sinks: int
    window: int
    capped: bool
    sliding: bool
    dtype: Operand
    interpret: bool


class Operands(NamedTuple):
    """What a kernel reads, as arrays or as references to them.

    Attributes:
        bounds: first slot and end of the slots that some query of a row sees, and the row's exact_from: [batch, 3].
        numbers: layer, sliding window.
        table: pages of each row, [batch, pages]; [1, 1] where there are none.
        cap: of the scores, [1].
        levels: of keys and of values.
        position: of each query, [batch, 1, rows].
        q: the planes of the projected queries, scaled to 1, [batch, kv_heads, planes, width, rows].
        norm: what the scaling took out, times what makes a score an exponent of two, [batch, kv_heads, 1, rows].
        codes: of keys and of values, as stored.
        scales: likewise.
        visible: [batch, 1, slots], or None.
    """

    bounds: Any
    numbers: Any
    table: Any
    cap: Any
    levels: tuple[Any, Any]
    position: Any
    q: Any
    norm: Any
    codes: tuple[Any, Any]
    scales: tuple[Any, Any]
    visible: Any


class Queries(NamedTuple):
    """The queries of one kv head, as values."""

    planes: tuple[Array, ...]
    norm: Array
    position: Array
    exact_from: Array
    sliding: Array
    cap: Array


class Block(NamedTuple):
    """Some tokens of one kv head, as values: tiles of bytes, and columns."""

    keys: list[Array]
    values: list[Array]
    key_scale: Array
    value_scale: Array
    token: Array
    inside: Array


class Carry(NamedTuple):
    """The online softmax: largest score, sum of weights, largest scale of a value, planes of the output."""

    peak: Array
    total: Array
    largest: Array
    out: tuple[Array, ...]


def start(setting: Setting) -> Carry:
    """Give the carry before the first block."""
    row = jnp.zeros((1, setting.rows), jnp.float32)
    out = jnp.zeros((setting.values.width, setting.rows), jnp.float32)
    return Carry(row - jnp.inf, row, row, (out,) * setting.values.planes)


def step(setting: Setting, lookups: tuple[Lookup, Lookup], queries: Queries, block: Block, carry: Carry) -> Carry:
    """Attend to one block."""
    key_level, value_level = lookups
    product = functools.partial(_product, precision="highest" if setting.dtype == "float32" else None)
    scores = jnp.zeros((setting.block, setting.rows), jnp.float32)
    for p, plane in enumerate(queries.planes):
        scores += product(key_level(block.keys, p), plane)
    scores *= block.key_scale * queries.norm
    if setting.capped:
        scores = queries.cap * jnp.tanh(scores / queries.cap) * np.float32(LOG2E)
    seen = block.inside & (block.token <= queries.position)
    if setting.sliding:
        seen &= block.token > queries.position - queries.sliding
    if setting.window:
        in_window = block.token > queries.position - np.int32(setting.window)
        seen &= ~(in_window & (block.token >= queries.exact_from))
    scores = jnp.where(seen, scores, -jnp.inf)

    peak = jnp.maximum(carry.peak, jnp.max(scores, axis=0, keepdims=True))
    safe = jnp.where(peak > -jnp.inf, peak, 0.0)
    weights, decay = jnp.exp2(scores - safe), jnp.exp2(carry.peak - safe)
    total = carry.total * decay + jnp.sum(weights, axis=0, keepdims=True)

    # A scale of a value may lie outside of float16's range; its ratio to the largest one so far does not.
    scale = jnp.where(block.inside, block.value_scale, 0.0)
    largest = jnp.maximum(carry.largest, jnp.max(jnp.abs(scale), axis=0, keepdims=True))
    unit = jnp.where(largest > 0, 1 / largest, 0.0)
    mixed = (weights * (scale * unit)).astype(setting.dtype)
    decay = decay * (carry.largest * unit)
    out = (part * decay + product(value_level(block.values, p), mixed) for p, part in enumerate(carry.out))
    return Carry(peak, total, largest, tuple(out))


def tiles(code: Code, axis: int, read: Callable[[int, int], Array]) -> list[Array]:
    """Read the bytes of some tokens, a tile for each field; `read(start, span)` puts byte start + i % span in lane i.

    Tiles are shifted so that field f of code `plane * span + i` is in the bits from `plane * fields[0]` of lane i,
    whatever the field's own width.
    """
    each, first = [], 0
    for width in code.fields:
        span = code.dim * width // 8
        tile = read(first, span)
        if span < code.span:
            tile >>= lax.broadcasted_iota(jnp.int32, tile.shape, axis) // np.int32(span) * np.int32(width)
        each.append(tile)
        first += span
    return each


def lookup(setting: Setting, code: Code, table: Any, *, gather: bool) -> Lookup:
    """Give the function that turns tiles into the levels of one plane.

    Args:
        setting: of the kernel.
        code: of what is looked up.
        table: reference to the levels.
        gather: whether it can be indexed with a tile.
    """
    if code.bits <= _SELECTED:
        levels = [table[i].astype(setting.dtype) for i in range(2**code.bits)]

        def selected(tiles: list[Array], plane: int) -> Array:
            left = levels
            for tile, width in zip(tiles, code.fields, strict=True):
                for bit in range(plane * code.fields[0], plane * code.fields[0] + width):
                    high = (tile & np.int32(1 << bit)) != 0
                    left = [jnp.where(high, b, a) for a, b in zip(left[::2], left[1::2], strict=True)]
            return left[0]

        return selected

    def found(tiles: list[Array], plane: int) -> Array:
        index, shift = jnp.zeros_like(tiles[0]), 0
        for tile, width in zip(tiles, code.fields, strict=True):
            index |= ((tile >> np.int32(plane * code.fields[0])) & np.int32(2**width - 1)) << np.int32(shift)
            shift += width
        if gather:
            return table[index].astype(setting.dtype)
        least = jnp.full(index.shape, table[0])
        return lax.fori_loop(1, 2**code.bits, lambda i, level: jnp.where(index >= i, table[i], level), least)

    return found


def _product(a: Array, b: Array, *, precision: str | None) -> Array:
    return jnp.matmul(a, b, precision=precision, preferred_element_type=jnp.float32)
