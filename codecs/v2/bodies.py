"""How each exact strategy and each other mode is written: words in, body out, with no choice made here."""

import struct

import numpy as np

from jaxquant.codecs.v2 import byteplanes, lossy, payload, runs, strategies, zframes


def body(words: np.ndarray, strategy: int, *, stride: int = 0, seed: int = lossy.SEED) -> tuple[bytes, bytes]:
    """Write words as one exact strategy, as QATQ's encoder does.

    Args:
        words: Unsigned words, one axis.
        strategy: Wire id.
        stride: Elements, of strategy 10 alone.
        seed: Of strategy 0 alone.

    Returns:
        The scale for the header, and the body after its prefix.
    """
    if strategy == strategies.PREDICTOR:
        return _predictor(words, seed)
    return payload.ONE, _BODIES[strategy](words, stride)


def _predictor(words: np.ndarray, seed: int) -> tuple[bytes, bytes]:
    scale, codes, residual, signs = lossy.analyse(words.view(np.float32), seed)
    predicted = lossy.predict(codes, signs, scale, residual, seed)[: words.size]
    missed = words ^ predicted.view(np.uint32)
    found = runs.find(missed, runs.WORDS)
    stream = runs.write(missed.astype(">u4").view(np.uint8), found, runs.WORDS)
    head = struct.pack(">Qf", seed, residual)
    return struct.pack(">f", scale), head + lossy.pack(codes) + _bits(signs) + stream


def _bits(signs: np.ndarray) -> bytes:
    return np.packbits(signs, bitorder="little").tobytes()


def swapped(words: np.ndarray) -> np.ndarray:
    """Return the bytes of words, most significant first."""
    return words.astype(words.dtype.newbyteorder(">")).view(np.uint8)


def constant(row: np.ndarray) -> bool:
    """Tell whether all bytes of a row are the same."""
    return bool((row[:64] == row[:1]).all() and (row == row[:1]).all())


def block_tags(rows: np.ndarray) -> list[int]:
    """Return what strategy 5 makes of every plane: 0 all zero, 2 constant, 1 neither."""
    return [2 * bool(row[:1].any()) if constant(row) else 1 for row in rows]


def block_size(tags: list[int], values: int) -> int:
    """Return the bytes of strategy 5 for planes of so many values."""
    return sum((1, 1 + values, 2)[tag] for tag in tags)


def _blocks(words: np.ndarray) -> bytes:
    rows = byteplanes.split(words)
    parts = []
    for row, tag in zip(rows, block_tags(rows), strict=True):
        parts += [bytes([tag]), row[: {0: 0, 1: row.size, 2: 1}[tag]].tobytes()]
    return b"".join(parts)


def _zstd(words: np.ndarray) -> bytes:
    return zframes.compress(byteplanes.split(words), 3)


_BODIES = {
    strategies.RAW: lambda words, stride: swapped(words).tobytes(),
    strategies.RUNS: lambda words, stride: runs.encode(swapped(words), runs.LONG),
    strategies.PLANE_RUNS: lambda words, stride: runs.encode(byteplanes.split(words).reshape(-1), runs.LONG),
    strategies.DELTA_RUNS: lambda words, stride: runs.encode(
        byteplanes.split(byteplanes.xor_previous(words)).reshape(-1), runs.LONG
    ),
    strategies.BLOCKS: lambda words, stride: _blocks(words),
    strategies.PACKED: lambda words, stride: runs.encode(byteplanes.split(words).reshape(-1), runs.PACKED),
    strategies.ZSTD: lambda words, stride: _zstd(words),
    strategies.DIFFERENCE: lambda words, stride: _zstd(byteplanes.subtract_previous(words)),
    strategies.ADJACENT: lambda words, stride: _zstd(byteplanes.xor_previous(words)),
    strategies.STRIDED: lambda words, stride: struct.pack(">I", stride) + _zstd(byteplanes.xor_previous(words, stride)),
}


def control(values: np.ndarray, mode: int, seed: int = lossy.SEED) -> bytes:
    """Write float32 values in one of QATQ's other modes, as a bare payload.

    Args:
        values: float32, one axis.
        mode: 1 lossy-i4, 2 lossless-f32, 3 phase1-q4 or 5 turboquant-q4.
        seed: Of modes 3 and 5.

    Returns:
        The whole payload.

    Raises:
        ValueError: Values so small or large that QATQ could not read its own output.
    """
    words = values.view(np.uint32)
    if mode == 2:
        return payload.head(2, words.size, payload.checksum(words)) + swapped(words).tobytes()
    if mode == 1:
        scale, codes = lossy.quantize(values)
        content = lossy.pack(codes)
    else:
        phase1 = mode == 3
        scale, codes, residual, signs = (lossy.analyse if phase1 else lossy.sketch)(values, seed)
        prefix = struct.pack(">4sQf4x", b"P1Q4" if phase1 else b"TQ4R", seed, residual)
        content = prefix + lossy.pack(codes) + _bits(signs)
    return payload.head(mode, words.size, payload.checksum(words), struct.pack(">f", scale)) + content
