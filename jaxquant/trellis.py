"""Trellis-coded quantization: levels that depend on neighbouring codes, at exactly `bits` bits a coordinate.

The codes of a vector are one ring of bits. Coordinate t owns `bits` of them, and its level is chosen by the window that
starts there and reaches over the next bits of the ring: `log2(states) + bits` in all. So a vector costs its bits and
not one more, any coordinate decodes alone, from three neighbouring bytes at most, and all of them decode at once. The
encoder weighs all coordinates together: it searches for the ring of least squared error with Viterbi's algorithm, which
takes `states * 2**bits` additions and comparisons a coordinate and pass.

`encode` and `decode` are the code of coordinates of unit variance; `Trellis` is the quantizer of vectors.

References:
    M. Marcellin, T. Fischer, "Trellis coded quantization of memoryless and Gauss-Markov sources", IEEE Transactions on
    Communications 38 (1990); A. Tseng, Q. Sun, D. Hou, C. De Sa, "QTIP: Quantization with trellises and incoherence
    processing", arXiv:2406.11235 (bit-shift trellis, computed codes "1MAD" and "3INST", tail-biting in two passes).

Differs from the papers: `states` counts what the trellis remembers between two coordinates, so that QTIP's L is
`log2(states) + bits`; windows reach forward instead of back; tables are trained for every rate and number of states,
odd under inversion of all bits; the rate may change from coordinate to coordinate.
"""

import functools
import operator
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8, UInt32

from jaxquant import viterbi
from jaxquant._pytree import pytree, static
from jaxquant.protocols import Rotation
from jaxquant.quantizers import Quantized, ScaleDtype, ScaleRule, correction, normalized, rounded

Runs = tuple[tuple[tuple[int, ...], int], ...]
Kind = Literal["table", "1mad", "3inst"]

STATES = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
_WINDOW = 14  # bits of the longest window: three bytes hold it wherever it starts, and 16,384 levels fit into caches
_TABLES = Path(__file__).with_name("trellis.npz")
_VECTORS = 64  # that are searched at a time: what the search remembers of them fits into a processor's cache
_LARGEST = 2.0**10  # of a coordinate


@pytree
class Code:
    """A code of `dim` coordinates of unit variance.

    Attributes:
        tables: for each run and each place of its pattern, the level of every window; for a computed code, one factor.
        runs: the widths, as (pattern, repetitions): (((2,), 128),) has 2 bits a coordinate, (((3, 2), 64),) has 2.5.
        states: of the trellis, a power of 2.
        kind: "table", or a formula for levels of unit variance: "1mad" or "3inst".
    """

    tables: tuple[tuple[Float[Array, " levels"], ...], ...]
    runs: Runs = static()
    states: int = static()
    kind: Kind = static(default="table")

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits that each coordinate owns."""
        return tuple(bits for pattern, count in self.runs for bits in pattern * count)

    @property
    def dim(self) -> int:
        """Coordinates."""
        return len(self.widths)

    @property
    def memory(self) -> int:
        """Bits by which windows of neighbours overlap."""
        return self.states.bit_length() - 1

    @property
    def n_bytes(self) -> int:
        """Bytes of a coded vector."""
        return sum(self.widths) // 8


@pytree
class Trellis:
    """Norm, rotation and a trellis code: `quantizers.Scalar` with another code for the coordinates.

    Attributes:
        rotation: applied first.
        code: of rotated coordinates.
        scale: what the stored scale keeps right; see `quantizers.Scalar`.
        scale_dtype: of the scale.
    """

    rotation: Rotation
    code: Code
    scale: ScaleRule = static(default="norm")
    scale_dtype: ScaleDtype = static(default="float16")

    @property
    def dim(self) -> int:
        """Length of the vectors."""
        return self.rotation.dim

    def quantize(self, x: Float[Array, "*batch dim"], /) -> Quantized:
        """Code vectors."""
        norm, y = normalized(self.rotation, x)
        packed = encode(self.code, y)
        scales = norm if self.scale == "norm" else norm * correction(self.scale, y, decode(self.code, packed))
        return Quantized(codes=packed, scales=rounded(scales, self.scale_dtype))

    def expand(self, code: Quantized, /) -> Float[Array, "*batch dim"]:
        """Look up and scale."""
        assert code.scales is not None
        return decode(self.code, code.codes) * (code.scales.astype(jnp.float32) * self.dim**-0.5)[..., None]

    def restore(self, y: Float[Array, "*batch dim"], /) -> Float[Array, "*batch dim"]:
        """Rotate back."""
        return self.rotation.unrotate(y)

    def project(self, q: Float[Array, "*batch dim"], /) -> Float[Array, "*batch dim"]:
        """Rotate."""
        return self.rotation.rotate(q.astype(jnp.float32))


def code(runs: Runs, *, states: int, kind: Kind = "table") -> Code:
    """Build a code with levels for the unit normal.

    Args:
        runs: widths of the coordinates, in bits, as in `Code`; see `most_bits`.
        states: of the trellis; see `STATES`.
        kind: where levels come from: a trained table, or a formula.

    Raises:
        ValueError: an argument is out of range, or the bits do not fill whole bytes, or are fewer than the trellis
            remembers.

    Example:
        >>> code((((3, 2), 64),), states=16).n_bytes
        40
    """
    if kind not in Kind.__args__:
        raise ValueError(f"kind must be one of {', '.join(Kind.__args__)}, got {kind!r}")
    if states not in STATES:
        raise ValueError(f"states must be one of {', '.join(map(str, STATES))}, got {states!r}")
    wrong = [bits for pattern, _ in runs for bits in pattern if bits not in range(1, most_bits(states) + 1)]
    if wrong:
        raise ValueError(f"bits must be an integer from 1 to {most_bits(states)} at {states} states, got {wrong[0]!r}")
    total, memory = sum(sum(pattern) * count for pattern, count in runs), states.bit_length() - 1
    if total % 8 or total < memory:
        raise ValueError(f"runs must fill whole bytes, and {memory} bits at least, got {total} bits")
    tables = tuple(tuple(jnp.asarray(levels(bits, states, kind)) for bits in pattern) for pattern, _ in runs)
    return Code(tables=tables, runs=runs, states=states, kind=kind)


def most_bits(states: int) -> int:
    """Say how many bits a coordinate can have: at most 6, and with the states a window of 14.

    Example:
        >>> most_bits(256), most_bits(1024)
        (6, 4)
    """
    return min(6, _WINDOW - (states.bit_length() - 1))


@functools.cache
def levels(bits: int, states: int, kind: Kind = "table") -> Float[np.ndarray, " levels"]:
    """Give the level of every window for the unit normal, or the factor of a formula.

    Example:
        >>> levels(1, 4).shape, levels(2, 256, "1mad").shape
        ((8,), (1,))
    """
    if kind != "table":
        every = np.asarray(_formula(jnp.arange(states << bits, dtype=jnp.uint32), kind), np.float64)
        return np.array([(1 - 4.0**-bits) ** 0.5 / every.std()], np.float32)
    with np.load(_TABLES, allow_pickle=False) as tables:
        half = tables[f"{bits}.{states}"].astype(np.float32)
    return np.concatenate([half, -half[::-1]])


def decode(
    code: Code, packed: UInt8[Array, "*batch n_bytes"], some: range | None = None
) -> Float[Array, "*batch coordinates"]:
    """Look up levels: of all coordinates, or of some, each from the bytes of its own window.

    Example:
        >>> two = code((((2,), 8),), states=16)
        >>> packed = encode(two, jnp.linspace(-2, 2, 8))
        >>> bool((decode(two, packed)[3:5] == decode(two, packed, range(3, 5))).all())
        True
    """
    seen, which = windows(code, packed, some), tables_of(code)[_index(code, some)]
    every = [table for tables in code.tables for table in tables]
    if code.kind != "table":
        return jnp.concatenate(every)[which] * _formula(seen, code.kind)
    before = np.cumsum([0, *(table.shape[-1] for table in every)])
    place = seen.astype(jnp.int32) + before[which].astype(np.int32)
    return jnp.take(jnp.concatenate(every), place, mode="clip")


def windows(
    code: Code, packed: UInt8[Array, "*batch n_bytes"], some: range | None = None
) -> UInt32[Array, "*batch coordinates"]:
    """Cut out the window of each coordinate, or of some.

    Example:
        >>> windows(code((((4,), 4),), states=4), jnp.array([0xD2, 0x64], jnp.uint8)).tolist()
        [18, 13, 36, 38]
    """
    widths = np.array(code.widths)
    starts, widths = (part[_index(code, some)] for part in (np.cumsum(widths) - widths, widths))
    ring = packed.astype(jnp.uint32)
    words = ring | jnp.roll(ring, -1, axis=-1) << np.uint32(8) | jnp.roll(ring, -2, axis=-1) << np.uint32(16)
    masks = ((code.states << widths) - 1).astype(np.uint32)
    return words[..., starts // 8] >> (starts % 8).astype(np.uint32) & masks


def encode(
    code: Code, y: Float[Array, "*batch dim"], weights: Float[Array, "*#batch dim"] | None = None
) -> UInt8[Array, "*batch n_bytes"]:
    """Search for the codes of least squared error (`viterbi.ring`), some vectors at a time.

    Args:
        code: to use.
        y: finite coordinates.
        weights: cost of a squared error in each coordinate, not negative; None counts all alike.
    """
    *batch, dim = y.shape
    rows = [jnp.clip(y, -_LARGEST, _LARGEST)] + ([] if weights is None else [jnp.broadcast_to(weights, y.shape)])
    count = y.size // dim
    size = min(_VECTORS, count)
    if not size:
        return jnp.zeros((*batch, code.n_bytes), jnp.uint8)
    rows = [jnp.pad(row.reshape(count, dim), ((0, -count % size), (0, 0))).reshape(-1, size, dim) for row in rows]
    packed = lax.map(lambda some: viterbi.ring(_parts(code, *some), code.states), rows)
    return packed.reshape(-1, code.n_bytes)[:count].reshape(*batch, code.n_bytes)


def _parts(
    code: Code, y: Float[Array, "vectors dim"], weights: Float[Array, "vectors dim"] | None = None
) -> list[viterbi.Part]:
    """Cut vectors into runs, as the search wants them."""
    out, first = [], 0
    for (pattern, count), tables in zip(code.runs, code.tables, strict=True):
        run, shape = slice(first, first + count * len(pattern)), (count, len(pattern), -1)
        first = run.stop
        costs = None if weights is None else weights[:, run].T.reshape(shape)
        if code.kind != "table":
            windows = [jnp.arange(code.states << bits, dtype=jnp.uint32) for bits in pattern]
            tables = [factor * _formula(each, code.kind) for factor, each in zip(tables, windows, strict=True)]
        out.append(viterbi.Part(pattern, tuple(tables), y[:, run].T.reshape(shape), costs))
    return out


def _index(code: Code, some: range | None) -> np.ndarray:
    return np.arange(code.dim)[slice(None) if some is None else np.array(some, np.int64)]


def tables_of(code: Code) -> np.ndarray:
    """Number the tables of a code from 0 on, and say which of them each coordinate has.

    Example:
        >>> tables_of(code((((3, 2), 2), ((1,), 6)), states=4))
        array([0, 1, 0, 1, 2, 2, 2, 2, 2, 2])
    """
    out, first = [], 0
    for pattern, count in code.runs:
        out += list(range(first, first + len(pattern))) * count
        first += len(pattern)
    return np.array(out)


def _formula(windows: UInt32[Array, "*batch"], kind: Kind) -> Float[Array, "*batch"]:
    """Compute levels from windows (QTIP, sections 3.1.1 and appendix): not correlated, close to normal."""
    if kind == "1mad":
        mixed = windows * np.uint32(34038481) + np.uint32(76625530)
        octets = [mixed >> np.uint32(shift) & np.uint32(255) for shift in (0, 8, 16, 24)]
        return functools.reduce(operator.add, octets).astype(jnp.float32) - 510.0
    mixed = windows * np.uint32(89226354) + np.uint32(64248484)
    mixed = mixed & np.uint32(0x8FFF8FFF) ^ np.uint32(0x3B603B60)
    halves = ((mixed >> np.uint32(shift)).astype(jnp.uint16) for shift in (0, 16))
    first, second = (lax.bitcast_convert_type(half, jnp.float16).astype(jnp.float32) for half in halves)
    return first + second
