"""The closed table of exact strategies: wire id, which widths it serves, and how its body becomes words again."""

import dataclasses
from collections.abc import Callable

import numpy as np

from jaxquant.codecs import errors
from jaxquant.codecs.v2 import byteplanes, lossy, runs, zframes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strategy:
    """One row of the table.

    Attributes:
        label: QATQ's name.
        widths: Bytes per element that it serves.
        decode: Fills words from a body; arguments body, words, header scale, place for messages.
    """

    label: str
    widths: tuple[int, ...]
    decode: Callable[[memoryview, np.ndarray, np.float32, str], None]


def _predictor(body: memoryview, words: np.ndarray, scale: np.float32, where: str) -> None:
    padded = -(-words.size // 4) * 4
    codes_end = 12 + -(-padded // 2)
    signs_end = codes_end + -(-padded // 8)
    if len(body) < signs_end:
        raise errors.CorruptError(f"{where}: predictor body has {len(body)} bytes, at least {signs_end} are needed")
    residual = np.frombuffer(body[8:12], ">f4").astype(np.float32)[0]
    if not (np.isfinite(residual) and residual >= 0):
        raise errors.CorruptError(f"{where}: residual scale {residual} is not a finite number from 0")
    octets = np.frombuffer(body, np.uint8)
    runs.read(octets[signs_end:], words.view(np.uint8), runs.WORDS, where)
    words.byteswap(inplace=True)
    codes = lossy.unpack(octets[12:codes_end], padded)
    signs = np.unpackbits(octets[codes_end:signs_end], count=padded, bitorder="little")
    seed = int.from_bytes(body[:8], "big")
    predicted = lossy.predict(codes, signs, scale, residual, seed)[: words.size]
    np.bitwise_xor(words, predicted.view(np.uint32), out=words)


def _raw(body: memoryview, words: np.ndarray, scale: np.float32, where: str) -> None:
    if len(body) != words.nbytes:
        raise errors.CorruptError(f"{where}: {len(body)} raw bytes for {words.size} elements of {words.itemsize}")
    np.copyto(words, np.frombuffer(body, words.dtype.newbyteorder(">")))


def _interleaved_runs(body: memoryview, words: np.ndarray, scale: np.float32, where: str) -> None:
    runs.read(np.frombuffer(body, np.uint8), words.view(np.uint8), runs.LONG, where)
    words.byteswap(inplace=True)


def _plane_runs(body: memoryview, words: np.ndarray, grammar: runs.Grammar, where: str) -> None:
    rows = np.empty((words.itemsize, words.size), np.uint8)
    runs.read(np.frombuffer(body, np.uint8), rows.reshape(-1), grammar, where)
    byteplanes.merge(list(rows), words)


def _long_runs(body: memoryview, words: np.ndarray, scale: np.float32, where: str) -> None:
    _plane_runs(body, words, runs.LONG, where)


def _packed_runs(body: memoryview, words: np.ndarray, scale: np.float32, where: str) -> None:
    _plane_runs(body, words, runs.PACKED, where)


def _delta_runs(body: memoryview, words: np.ndarray, scale: np.float32, where: str) -> None:
    _plane_runs(body, words, runs.LONG, where)
    byteplanes.undo_xor(words)


def _blocks(body: memoryview, words: np.ndarray, scale: np.float32, where: str) -> None:
    rows, position = [], 0
    for plane in range(words.itemsize):
        tag = body[position] if position < len(body) else None
        size = {0: 0, 1: words.size, 2: 1}.get(tag) if tag is not None else None
        data = np.frombuffer(body, np.uint8)[position + 1 : position + 1 + (size or 0)]
        if size is None or data.size < size:
            found = "nothing" if tag is None else f"tag {tag}"
            raise errors.CorruptError(f"{where}, offset {position}: plane {plane} has {found} and too few bytes")
        rows.append(np.broadcast_to(np.uint8(0) if tag == 0 else data[: words.size], words.size) if tag != 1 else data)
        position += 1 + size
    if position != len(body):
        raise errors.CorruptError(f"{where}, offset {position}: {len(body) - position} bytes after the last plane")
    byteplanes.merge(rows, words)


def _zstd(body: memoryview, words: np.ndarray, scale: np.float32, where: str) -> None:
    pieces = zframes.read(body, words.nbytes, where)
    if [piece.size for piece in pieces] != [words.size] * words.itemsize:
        whole = pieces[0] if len(pieces) == 1 else np.concatenate([*pieces, np.empty(0, np.uint8)])
        pieces = list(whole.reshape(words.itemsize, words.size))
    byteplanes.merge(pieces, words)


def _difference_zstd(body: memoryview, words: np.ndarray, scale: np.float32, where: str) -> None:
    _zstd(body, words, scale, where)
    byteplanes.undo_subtract(words)


def _adjacent_zstd(body: memoryview, words: np.ndarray, scale: np.float32, where: str) -> None:
    _zstd(body, words, scale, where)
    byteplanes.undo_xor(words)


def _strided_zstd(body: memoryview, words: np.ndarray, scale: np.float32, where: str) -> None:
    if len(body) < 4:
        raise errors.CorruptError(f"{where}: {len(body)} bytes leave no room for a stride")
    stride = int.from_bytes(body[:4], "big")
    if not 1 <= stride < words.size:
        raise errors.CorruptError(f"{where}: stride {stride} is outside 1 to {words.size - 1}")
    _zstd(body[4:], words, scale, where)
    byteplanes.undo_xor(words, stride)


PREDICTOR, RAW, RUNS, PLANE_RUNS, DELTA_RUNS, BLOCKS, PACKED, ZSTD, DIFFERENCE, ADJACENT, STRIDED = range(11)

STRATEGIES = {
    PREDICTOR: Strategy(label="predictor-xor", widths=(4,), decode=_predictor),
    RAW: Strategy(label="raw-bits", widths=(2, 4), decode=_raw),
    RUNS: Strategy(label="byte-rle", widths=(2, 4), decode=_interleaved_runs),
    PLANE_RUNS: Strategy(label="byte-plane-rle", widths=(2, 4), decode=_long_runs),
    DELTA_RUNS: Strategy(label="delta-xor-byte-plane-rle", widths=(4,), decode=_delta_runs),
    BLOCKS: Strategy(label="byte-plane-blocks", widths=(4,), decode=_blocks),
    PACKED: Strategy(label="byte-plane-packed-rle", widths=(2, 4), decode=_packed_runs),
    ZSTD: Strategy(label="byte-plane-zstd", widths=(2, 4), decode=_zstd),
    DIFFERENCE: Strategy(label="quaternion-chain-zstd", widths=(4,), decode=_difference_zstd),
    ADJACENT: Strategy(label="adjacent-xor-byte-plane-zstd", widths=(2,), decode=_adjacent_zstd),
    STRIDED: Strategy(label="strided-xor-byte-plane-zstd", widths=(2,), decode=_strided_zstd),
}
