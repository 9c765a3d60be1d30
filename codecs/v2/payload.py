"""QATQ v1 payloads: a 28-byte envelope around one tensor, in one of five modes."""

import dataclasses
import struct

import numpy as np

from jaxquant.codecs import errors
from jaxquant.codecs.limits import Limits
from jaxquant.codecs.v2 import fnv, lossy
from jaxquant.codecs.v2.strategies import STRATEGIES

MAGIC = b"QATQ"
EXACT_MAGIC = b"QEX1"
HEADER = struct.Struct(">4sBB2sQ4sQ")
EXACT = struct.Struct(">4sB3s")
LOSSY = struct.Struct(">4sQ4s4s")
MAX_VALUES = 1 << 26
MODES = {1: "lossy-i4", 2: "lossless-f32", 3: "phase1-q4", 4: "qatq-exact", 5: "turboquant-q4"}
DTYPES = {b"\0\0\0": "f32", b"\1\2\0": "f16", b"\2\2\0": "bf16"}
WIDTHS = {"f32": 4, "f16": 2, "bf16": 2}
ONE = bytes.fromhex("3f800000")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Payload:
    """A payload whose envelope is valid; its body is not yet looked at.

    Attributes:
        mode: Wire id, 1 to 5.
        values: Elements.
        scale: Of the four-bit codes, 1 where unused.
        checksum: FNV-1a of the original values.
        dtype: "f32", "f16" or "bf16".
        strategy: Wire id of the exact strategy, None in the other modes.
        body: What follows the envelope, and the prefix of an exact body.
        where: Place of the payload, for messages.
    """

    mode: int
    values: int
    scale: np.float32
    checksum: int
    dtype: str
    strategy: int | None
    body: memoryview
    where: str


def parse(data: memoryview, limits: Limits, where: str = "payload") -> Payload:
    """Check an envelope and the prefix of an exact body.

    Args:
        data: A whole payload.
        limits: Bounds on what it may claim.
        where: Place of the payload, for messages.

    Returns:
        The parsed payload.

    Raises:
        UnsupportedError: Unknown magic, version, mode, dtype or strategy.
        CorruptError: A field contradicts the format.
        LimitError: More values than allowed.
    """
    if len(data) < HEADER.size:
        raise errors.CorruptError(f"{where}: {len(data)} bytes, the header alone has {HEADER.size}")
    magic, version, mode, reserved, values, scale_bits, checksum = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise errors.UnsupportedError(f"{where}, offset 0: magic {magic!r} is neither QATQ nor QATC")
    if version != 1:
        raise errors.UnsupportedError(f"{where}, offset 4: QATQ version {version}, this decoder reads 1")
    if mode not in MODES:
        raise errors.UnsupportedError(f"{where}, offset 5: mode {mode} is none of 1 to 5")
    if reserved != b"\0\0":
        raise errors.CorruptError(f"{where}, offset 6: reserved bytes are {reserved.hex()}, not 0000")
    limits.check("chunk_values", values, f"{where}, offset 8")
    if values > MAX_VALUES:
        raise errors.LimitError(f"{where}, offset 8: {values} values, the format allows {MAX_VALUES}")
    scale = np.frombuffer(scale_bits, ">f4").astype(np.float32)[0]
    if not (np.isfinite(scale) and scale > 0):
        raise errors.CorruptError(f"{where}, offset 16: scale {scale_bits.hex()} is not a finite number above 0")
    body, dtype, strategy = data[HEADER.size :], "f32", None
    if mode == 4:
        dtype, strategy = _exact_prefix(body, f"{where}, exact body")
        body = body[EXACT.size :]
    limits.check("values", values, f"{where}, offset 8")
    limits.check("decoded_bytes", values * WIDTHS[dtype], f"{where}, offset 8")
    return Payload(
        mode=mode,
        values=values,
        scale=scale,
        checksum=checksum,
        dtype=dtype,
        strategy=strategy,
        body=body,
        where=where,
    )


def _exact_prefix(body: memoryview, where: str) -> tuple[str, int]:
    """Check the eight bytes before an exact strategy's own."""
    if len(body) < EXACT.size:
        raise errors.CorruptError(f"{where}: {len(body)} bytes, the prefix alone has {EXACT.size}")
    magic, strategy, tag = EXACT.unpack_from(body)
    if magic != EXACT_MAGIC:
        raise errors.CorruptError(f"{where}, offset 0: magic {magic!r} is not {EXACT_MAGIC!r}")
    if tag not in DTYPES:
        raise errors.UnsupportedError(f"{where}, offset 5: dtype tag {tag.hex()} is none of f32, f16, bf16")
    if strategy not in STRATEGIES:
        raise errors.UnsupportedError(f"{where}, offset 4: strategy {strategy} is none of 0 to {max(STRATEGIES)}")
    if WIDTHS[DTYPES[tag]] not in STRATEGIES[strategy].widths:
        raise errors.CorruptError(f"{where}, offset 4: {STRATEGIES[strategy].label} does not serve {DTYPES[tag]}")
    return DTYPES[tag], strategy


def fill(payload: Payload, words: np.ndarray) -> None:
    """Decode a payload's body without looking at its checksum.

    Args:
        payload: From `parse`.
        words: `payload.values` unsigned words of the dtype's width, to fill.

    Raises:
        CorruptError: The body is malformed or holds another number of values.
    """
    if payload.strategy is not None:
        where = f"{payload.where}, {STRATEGIES[payload.strategy].label}"
        STRATEGIES[payload.strategy].decode(payload.body, words, payload.scale, where)
    elif payload.mode == 2:
        _expect(payload, 4 * payload.values)
        np.copyto(words, np.frombuffer(payload.body, ">u4"))
    elif payload.mode == 1:
        _expect(payload, -(-payload.values // 2))
        codes = lossy.unpack(np.frombuffer(payload.body, np.uint8), payload.values)
        np.copyto(words, lossy.dequantize(codes, payload.scale).view(np.uint32))
    else:
        _fill_lossy(payload, words)


def _expect(payload: Payload, size: int) -> None:
    if len(payload.body) != size:
        raise errors.CorruptError(
            f"{payload.where}, {MODES[payload.mode]}: body of {len(payload.body)} bytes, {size} are needed"
        )


def _fill_lossy(payload: Payload, words: np.ndarray) -> None:
    """Decode modes 3 and 5."""
    phase1 = payload.mode == 3
    padded = -(-payload.values // 4) * 4 if phase1 else lossy.sketch_size(payload.values)
    signs = padded if phase1 else min(padded, 256)
    codes_end = LOSSY.size + -(-padded // 2)
    _expect(payload, codes_end + -(-signs // 8))
    magic, seed, residual_bits, reserved = LOSSY.unpack_from(payload.body)
    where = f"{payload.where}, {MODES[payload.mode]}"
    if magic != (b"P1Q4" if phase1 else b"TQ4R"):
        raise errors.CorruptError(f"{where}, offset 0: magic {magic!r}")
    if reserved != b"\0\0\0\0":
        raise errors.CorruptError(f"{where}, offset 16: reserved bytes are {reserved.hex()}, not 00000000")
    residual = np.frombuffer(residual_bits, ">f4").astype(np.float32)[0]
    if not (np.isfinite(residual) and residual >= 0):
        raise errors.CorruptError(f"{where}, offset 12: residual {residual_bits.hex()} is not a finite number from 0")
    octets = np.frombuffer(payload.body, np.uint8)
    codes = lossy.unpack(octets[LOSSY.size : codes_end], padded)
    bits = np.unpackbits(octets[codes_end:], count=signs, bitorder="little")
    rebuild = lossy.predict if phase1 else lossy.unsketch
    values = rebuild(codes, bits, payload.scale, residual, seed)[: payload.values]
    np.copyto(words, values.view(np.uint32))


def checksum(words: np.ndarray) -> int:
    """Hash words as the payload header does: f32 most significant byte first, 16-bit types as they lie in memory."""
    return fnv.fnv1a_words(words, swapped=words.itemsize == 4)


def row_checksums(rows: np.ndarray) -> list[int]:
    """Return `checksum` of every row of a matrix of words."""
    return fnv.fnv1a_rows(rows, swapped=rows.itemsize == 4)


def verify(payload: Payload, found: int) -> None:
    """Compare the stored checksum, in the modes that are exact.

    Raises:
        CorruptError: They differ.
    """
    if payload.mode in (2, 4) and found != payload.checksum:
        raise errors.CorruptError(
            f"{payload.where}, offset 20: checksum {payload.checksum:016x} stored, {found:016x} computed"
        )


def words_of(dtype: str, values: int) -> np.ndarray:
    """Return uninitialised words for values of a dtype."""
    return np.empty(values, np.uint16 if WIDTHS[dtype] == 2 else np.uint32)


def as_values(words: np.ndarray, dtype: str) -> np.ndarray:
    """Return the same memory under its NumPy dtype."""
    if dtype == "bf16":
        import ml_dtypes

        return words.view(ml_dtypes.bfloat16)
    return words.view(np.float16 if dtype == "f16" else np.float32)


def head(mode: int, values: int, found: int, scale: bytes = ONE) -> bytes:
    """Return the bytes of an envelope."""
    return HEADER.pack(MAGIC, 1, mode, b"\0\0", values, scale, found)


def exact_head(strategy: int, dtype: str) -> bytes:
    """Return the prefix of an exact body."""
    return EXACT.pack(EXACT_MAGIC, strategy, next(tag for tag, name in DTYPES.items() if name == dtype))
