"""Zstandard frames as QATC holds them: any number in a row, bounded before they are opened, and cheap ones to write."""

import dataclasses
import threading

import numpy as np
import zstandard

from jaxquant.codecs import errors

MAGIC = b"\x28\xb5\x2f\xfd"
_BLOCK = 128 << 10
_contexts = threading.local()


def read(body: memoryview, size: int, where: str) -> list[np.ndarray]:
    """Decode all frames of a body.

    Args:
        body: Whole body; skippable and empty frames are allowed between the others.
        size: Bytes that the frames must hold together.
        where: Place of the body, for messages.

    Returns:
        The content of every frame that has any, in order; together exactly `size` bytes.

    Raises:
        CorruptError: Truncated or damaged frames, other bytes between them, or another total size.
    """
    pieces, left, position = [], size, 0
    while position < len(body):
        at = f"{where}, offset {position}"
        if len(body) - position >= 8 and body[position + 1 : position + 4] == b"\x2a\x4d\x18":
            if body[position] >> 4 == 5:
                position += 8 + int.from_bytes(body[position + 4 : position + 8], "little")
                if position > len(body):
                    raise errors.CorruptError(f"{at}: skippable frame is cut short")
                continue
        end, bound = _extent(body, position, at)
        frame = body[position:end]
        position = end
        content = _open(frame, bound, left, at)
        left -= len(content)
        if content:
            pieces.append(np.frombuffer(content, np.uint8))
    if left:
        raise errors.CorruptError(f"{where}: zstd frames hold {size - left} bytes, {size} are needed")
    return pieces


def _extent(body: memoryview, start: int, at: str) -> tuple[int, int]:
    """End of the frame that starts here, and the most bytes its blocks can hold."""
    if body[start : start + 4] != MAGIC:
        raise errors.CorruptError(f"{at}: no zstd frame begins with {bytes(body[start : start + 4]).hex()}")
    if len(body) - start < 6:
        raise errors.CorruptError(f"{at}: zstd frame header is cut short")
    descriptor = body[start + 4]
    single = descriptor >> 5 & 1
    position = start + 6 - single + (0, 1, 2, 4)[descriptor & 3] + (single, 2, 4, 8)[descriptor >> 6]
    bound = last = 0
    while not last:
        header = int.from_bytes(body[position : position + 3], "little")
        last, kind, length = header & 1, header >> 1 & 3, header >> 3
        position += 3 + (1 if kind == 1 else length)
        bound += _BLOCK if kind == 2 else length
        if position > len(body):
            raise errors.CorruptError(f"{at}: zstd frame is cut short")
    position += 4 * (descriptor >> 2 & 1)
    if position > len(body):
        raise errors.CorruptError(f"{at}: zstd frame checksum is cut short")
    return position, bound


def _open(frame: memoryview, bound: int, left: int, at: str) -> bytes:
    """Decode one frame of at most `left` bytes."""
    try:
        size = zstandard.frame_content_size(frame)
        if size > left:
            raise errors.CorruptError(f"{at}: zstd frame claims {size} bytes, {left} are left to fill")
        if size == 0:
            return _decompressor().decompressobj().decompress(frame)
        if size < 0:
            return _open_unsized(frame, min(bound, left))
        if bound < size:
            raise errors.CorruptError(f"{at}: zstd frame claims {size} bytes, its blocks hold at most {bound}")
        return _decompressor().decompress(frame)
    except zstandard.ZstdError as error:
        raise errors.CorruptError(f"{at}: {error}") from None


def _open_unsized(frame: memoryview, most: int) -> bytes:
    """Decode a frame without a content size, whatever window it declares: no match can reach behind its content."""
    if most == 0:
        return _decompressor().decompressobj().decompress(frame)
    exponent = max(most - 1, (128 << 10) - 1).bit_length() - 10
    if frame[5] >> 3 > exponent:
        if frame[5] >> 3 > 21:
            raise zstandard.ZstdError("zstd frame declares a window above 2 GiB")
        frame = memoryview(bytes(frame[:5]) + bytes([exponent << 3]) + bytes(frame[6:]))
    return _decompressor().decompress(frame, max_output_size=most)


def _decompressor() -> zstandard.ZstdDecompressor:
    """One context per thread."""
    if not hasattr(_contexts, "decompressor"):
        _contexts.decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    return _contexts.decompressor


def compress(data, level: int) -> bytes:
    """Compress into one frame at a zstd level, as the reference library's one-shot call does."""
    key = f"level{level}"
    if not hasattr(_contexts, key):
        setattr(_contexts, key, zstandard.ZstdCompressor(level=level))
    return getattr(_contexts, key).compress(data)


def entropy(data) -> bytes:
    """Compress into one frame with hardly any matches: Huffman coding of the bytes, a block of 128 KiB at a time.

    zstd has no setting for literals only; the fast strategy with its longest minimal match and a tiny hash table
    finds next to none, in noise, and leaves the others to `compress`.
    """
    if not hasattr(_contexts, "entropy"):
        parameters = zstandard.ZstdCompressionParameters(
            strategy=zstandard.STRATEGY_FAST,
            target_length=0,
            min_match=7,
            hash_log=6,
            chain_log=6,
            search_log=1,
            window_log=17,
            write_content_size=True,
        )
        _contexts.entropy = zstandard.ZstdCompressor(compression_params=parameters)
    return _contexts.entropy.compress(data)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """Bytes to be written as blocks that zstd need not look at: `RAW` as they are, `RLE` all the same."""

    kind: int
    data: np.ndarray


RAW, RLE = 0, 1


def join(frames: list[bytes | Blocks]) -> list:
    """Put coded frames and blocks in a row, blocks that follow each other in one frame.

    Args:
        frames: Whole frames, and blocks of at least one byte.

    Returns:
        Parts to be joined; raw blocks are views, not copies.
    """
    parts: list = []
    waiting: list[Blocks] = []
    for frame in frames:
        if isinstance(frame, Blocks):
            waiting.append(frame)
            continue
        parts += [*_frame(waiting), frame]
        waiting = []
    return parts + _frame(waiting)


def _frame(blocks: list[Blocks]) -> list:
    if not blocks:
        return []
    size = sum(block.data.size for block in blocks)
    if size < 256:
        header = b"\x20" + size.to_bytes(1, "little")
    elif size < 256 + (1 << 16):
        header = b"\x60" + (size - 256).to_bytes(2, "little")
    else:
        header = b"\xa0" + size.to_bytes(4, "little")
    parts: list = [MAGIC + header]
    for block in blocks:
        for first in range(0, block.data.size, _BLOCK):
            piece = block.data[first : first + _BLOCK]
            last = block is blocks[-1] and first + _BLOCK >= block.data.size
            parts.append((piece.size << 3 | block.kind << 1 | last).to_bytes(3, "little"))
            parts.append((piece[:1] if block.kind == RLE else piece).data)
    return parts
