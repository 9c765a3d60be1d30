"""Viterbi's search through a bit-shift trellis, over one part of a vector after the other.

A state is the next bits of the stream, lowest first, and a window those and the `bits` after them. A step drops the
lowest `bits` of a state, which are the symbol of that step, and takes as many in at the top.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt8

_DEPTH = 12  # windows on either side of the seam that the first pass looks at
_BARRED = 1e30  # cost of starting in another state


class Part(NamedTuple):
    """Coordinates of one pattern of widths.

    Attributes:
        pattern: bits of each place.
        tables: level of every window at each place.
        y: coordinates, [repetitions, places, vectors].
        weights: cost of a squared error, likewise, or None where it is 1.
    """

    pattern: tuple[int, ...]
    tables: tuple[Array, ...]
    y: Array
    weights: Array | None


def ring(parts: Sequence[Part], states: int) -> UInt8[Array, "vectors n_bytes"]:
    """Find the ring of bits of least squared error; only where it closes is it not quite the best.

    A first pass over the coordinates on both sides of the seam, free at its ends, says in which state the ring closes;
    a second one, over all coordinates, starts and ends in that state.

    Args:
        parts: of the vectors; their bits must fill whole bytes.
        states: of the trellis, a power of 2.
    """
    dim = sum(part.y.shape[0] * part.y.shape[1] for part in parts)
    bits = sum(part.y.shape[0] * sum(part.pattern) for part in parts)
    each = depth(dim, bits, states)
    before, after = _near(parts, each, last=True), _near(parts, each, last=False)
    metric, survivors = _forward(jnp.zeros((states, parts[0].y.shape[-1])), before + after)
    seam = jnp.argmin(metric, axis=0).astype(jnp.int32)
    seam, _ = _back(seam, after, survivors[len(before) :], states)
    start = jnp.where(jnp.arange(states, dtype=jnp.int32)[:, None] == seam, 0.0, _BARRED)
    _, survivors = _forward(start, parts)
    _, symbols = _back(seam, parts, survivors, states)
    return _pack(parts, symbols)


def depth(dim: int, bits: int, states: int) -> int:
    """Say how many coordinates on either side of the seam the first pass looks at.

    Args:
        dim: coordinates.
        bits: of all of them.
        states: of the trellis.

    Example:
        >>> depth(128, 256, 256)
        48
    """
    return min(dim // 2, -(-_DEPTH * (states.bit_length() - 1) * dim // bits))


def _near(parts: Sequence[Part], count: int, *, last: bool) -> list[Part]:
    """Take the first or the last coordinates, `count` of them or a little more, by whole patterns."""
    out = []
    for part in reversed(parts) if last else parts:
        if count <= 0:
            break
        units = min(part.y.shape[0], -(-count // len(part.pattern)))
        some = slice(-units, None) if last else slice(units)
        weights = None if part.weights is None else part.weights[some]
        out.append(part._replace(y=part.y[some], weights=weights))
        count -= units * len(part.pattern)
    return out[::-1] if last else out


def _forward(metric: Float[Array, "states vectors"], parts: Sequence[Part]) -> tuple[Array, list[tuple[Array, ...]]]:
    """Give the least cost of ending in each state, and which bits the way there dropped in each coordinate."""
    survivors = []
    for part in parts:

        def step(metric: Array, row: tuple[Array, Array | None], part: Part = part) -> tuple[Array, tuple[Array, ...]]:
            dropped = []
            for place, (bits, table) in enumerate(zip(part.pattern, part.tables, strict=True)):
                error = (row[0][place] - table[:, None]) ** 2
                cost = error if row[1] is None else error * row[1][place]
                metric, symbol = _advance(metric, cost, bits)
                dropped.append(symbol)
            return metric, tuple(dropped)

        metric, dropped = lax.scan(step, metric, (part.y, part.weights))
        survivors.append(dropped)
    return metric, survivors


def _advance(
    metric: Float[Array, "states vectors"], cost: Float[Array, "windows vectors"], bits: int
) -> tuple[Float[Array, "states vectors"], UInt8[Array, "states vectors"]]:
    """Add, compare, select: window w leads from state w % states to state w >> bits, and drops its lowest bits.

    Costs are not negative, so that as integers they have the same order; their lowest bits are lent to the symbol.
    """
    states, vectors = metric.shape
    reached = jnp.tile(metric, (2**bits, 1)) + cost
    if not bits:
        return reached, jnp.zeros((states, vectors), jnp.uint8)
    low = np.int32(2**bits - 1)
    ordered = lax.bitcast_convert_type(reached, jnp.int32).reshape(states, 2**bits, vectors) & ~low
    best = jnp.min(ordered | jnp.arange(2**bits, dtype=jnp.int32)[:, None], axis=1)
    return lax.bitcast_convert_type(best & ~low, jnp.float32), (best & low).astype(jnp.uint8)


def _back(
    state: Int[Array, " vectors"], parts: Sequence[Part], survivors: list[tuple[Array, ...]], states: int
) -> tuple[Int[Array, " vectors"], list[tuple[Array, ...]]]:
    """Follow the best way back from a state: give the state it began in, and the bits of each coordinate."""
    out = []
    for part, dropped in zip(reversed(parts), reversed(survivors), strict=True):

        def step(state: Array, row: tuple[Array, ...], part: Part = part) -> tuple[Array, tuple[Array, ...]]:
            symbols = []
            for bits, each in zip(reversed(part.pattern), reversed(row), strict=True):
                symbol = jnp.take_along_axis(each, state[None], axis=0)[0]
                state = (state << bits | symbol.astype(jnp.int32)) & np.int32(states - 1)
                symbols.append(symbol)
            return state, tuple(symbols[::-1])

        state, symbols = lax.scan(step, state, dropped, reverse=True)
        out.append(symbols)
    return state, out[::-1]


def _pack(parts: Sequence[Part], symbols: list[tuple[Array, ...]]) -> UInt8[Array, "vectors n_bytes"]:
    """Lay the bits of all coordinates end to end, lowest first."""
    stream = []
    for part, each in zip(parts, symbols, strict=True):
        bits = [
            symbol[..., None] >> np.arange(width, dtype=np.uint8) & np.uint8(1)
            for width, symbol in zip(part.pattern, each, strict=True)
        ]
        run = jnp.moveaxis(jnp.concatenate(bits, axis=-1), 0, 1)
        stream.append(run.reshape(run.shape[0], -1))
    octets = jnp.concatenate(stream, axis=-1)
    octets = octets.reshape(octets.shape[0], -1, 8) << np.arange(8, dtype=np.uint8)
    return jnp.sum(octets, axis=-1, dtype=jnp.uint8)
