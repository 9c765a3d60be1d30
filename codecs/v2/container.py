"""QATC v2: consecutive chunks of one tensor, each a complete QATQ payload, under one header and one checksum."""

import array
import dataclasses
import itertools
import struct

import numpy as np

from jaxquant.codecs import errors, workers
from jaxquant.codecs.limits import Limits
from jaxquant.codecs.v2 import fnv, payload

MAGIC = b"QATC"
HEADER = struct.Struct(">4sBB2sQI4sQ")
_SMALLEST = payload.HEADER.size + payload.EXACT.size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Container:
    """A container whose header and chunk headers agree with each other and with its size.

    Attributes:
        values: Elements in all chunks.
        checksum: FNV-1a of everything after the header.
        dtype: Of every chunk.
        starts: Offset of every chunk's payload.
        sizes: Bytes of every chunk's payload.
        firsts: Index of every chunk's first element, and the total.
        data: The whole file.
    """

    values: int
    checksum: int
    dtype: str
    starts: array.array
    sizes: array.array
    firsts: array.array
    data: memoryview

    def chunk(self, index: int, limits: Limits) -> payload.Payload:
        """Parse the payload of one chunk."""
        start = self.starts[index]
        return payload.parse(self.data[start : start + self.sizes[index]], limits, _place(index, start))


def _place(index: int, start: int) -> str:
    return f"chunk {index} at offset {start}"


def parse(data: memoryview, limits: Limits) -> Container:
    """Check the header and walk the chunks' headers.

    Args:
        data: A whole file.
        limits: Bounds on what it may claim.

    Returns:
        Where everything is.

    Raises:
        UnsupportedError: Another version or mode, or something unknown inside a chunk's header.
        CorruptError: Lengths and counts contradict each other.
        LimitError: The file claims more than allowed.
    """
    if len(data) < HEADER.size:
        raise errors.CorruptError(f"container: {len(data)} bytes, the header alone has {HEADER.size}")
    magic, version, mode, reserved, values, chunks, reserved_too, checksum = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise errors.UnsupportedError(f"container, offset 0: magic {magic!r} is neither QATQ nor QATC")
    if version != 2:
        raise errors.UnsupportedError(f"container, offset 4: QATC version {version}, this decoder reads 2 and 3")
    if mode != 4:
        raise errors.UnsupportedError(f"container, offset 5: mode {mode}, a container holds exact payloads (4)")
    if reserved != b"\0\0" or reserved_too != b"\0\0\0\0":
        raise errors.CorruptError("container, offsets 6 and 20: reserved bytes are not zero")
    limits.check("encoded_bytes", len(data), "container")
    limits.check("values", values, "container, offset 8")
    if chunks == 0:
        raise errors.CorruptError("container, offset 16: no chunks, even an empty tensor has one")
    limits.check("chunks", chunks, "container, offset 16")
    if chunks > (len(data) - HEADER.size) // 4:
        raise errors.CorruptError(f"container, offset 16: {chunks} chunks do not fit into {len(data)} bytes")
    starts, sizes, firsts, dtype = array.array("Q"), array.array("Q"), array.array("Q", [0]), ""
    position = HEADER.size
    for index in range(chunks):
        size = int.from_bytes(data[position : position + 4], "big")
        start = position + 4
        place = _place(index, start)
        if start > len(data):
            raise errors.CorruptError(f"{place}: the file ends at {len(data)}, before the chunk's length")
        limits.check("chunk_bytes", size, place)
        if size < _SMALLEST or start + size > len(data):
            raise errors.CorruptError(
                f"{place}: length {size}, at least {_SMALLEST} and at most {len(data) - start} are possible"
            )
        head = payload.parse(data[start : start + size], limits, place)
        if head.mode != 4:
            raise errors.UnsupportedError(f"{place}, offset 5: mode {head.mode}, a container holds exact payloads (4)")
        if dtype and head.dtype != dtype:
            raise errors.CorruptError(f"{place}: dtype {head.dtype} after chunks of {dtype}")
        dtype = head.dtype
        firsts.append(firsts[-1] + head.values)
        if firsts[-1] > values:
            raise errors.CorruptError(f"{place}: chunks so far hold {firsts[-1]} values, the header says {values}")
        starts.append(start)
        sizes.append(size)
        position = start + size
    if position != len(data):
        raise errors.CorruptError(f"container, offset {position}: {len(data) - position} bytes after the last chunk")
    if firsts[-1] != values:
        raise errors.CorruptError(f"container, offset 8: {values} values declared, chunks hold {firsts[-1]}")
    limits.check("decoded_bytes", values * payload.WIDTHS[dtype], "container, offset 8")
    return Container(
        values=values, checksum=checksum, dtype=dtype, starts=starts, sizes=sizes, firsts=firsts, data=data
    )


def fill(container: Container, limits: Limits, words: np.ndarray, threads: int, chunks: range | None = None) -> None:
    """Decode chunks and verify their checksums, and with the first chunk the container's own.

    Args:
        container: From `parse`.
        limits: As given to `parse`.
        words: Unsigned words to fill, one for every value of the chunks.
        threads: Chunks decoded at the same time.
        chunks: Consecutive chunks to decode; all by default.

    Raises:
        CorruptError: A checksum differs or a body is malformed.
    """
    chunks = range(len(container.starts)) if chunks is None else chunks
    firsts = np.frombuffer(container.firsts, np.uint64)[chunks.start : chunks.stop + 1].astype(np.int64)
    firsts -= firsts[0]
    even = _even_chunks(firsts)
    together = even if fnv.hashes_rows_faster(words, even) else 0

    def one(index: int) -> payload.Payload:
        chunk = container.chunk(chunks[index], limits)
        part = words[firsts[index] : firsts[index + 1]]
        payload.fill(chunk, part)
        if index >= together:
            payload.verify(chunk, payload.checksum(part))
        return chunk

    def several(start: int) -> list[int]:
        rows = words[: firsts[together]].reshape(together, -1)
        return payload.row_checksums(rows[start : start + group])

    results = workers.ordered(one, range(len(chunks)), threads)
    if chunks.start == 0:
        check(container)
    heads = list(results)
    group = -(-together // threads) if together >= 16 * threads else max(together, 1)
    found = itertools.chain.from_iterable(workers.ordered(several, range(0, together, group), threads))
    for head, checksum in zip(heads, found, strict=False):
        payload.verify(head, checksum)


def _even_chunks(firsts: np.ndarray) -> int:
    """Count the chunks at the start that have one size."""
    sizes = np.diff(firsts)
    different = np.flatnonzero(sizes != sizes[0])
    return int(different[0]) if different.size else sizes.size


def check(container: Container) -> None:
    """Verify the container's own checksum.

    Raises:
        CorruptError: It differs.
    """
    found = fnv.fnv1a(container.data[HEADER.size :])
    if found != container.checksum:
        raise errors.CorruptError(
            f"container, offset 24: checksum {container.checksum:016x} stored, {found:016x} computed"
        )


def head(values: int, chunks: int, checksum: int) -> bytes:
    """Return the bytes of a header."""
    return HEADER.pack(MAGIC, 2, 4, b"\0\0", values, chunks, b"\0\0\0\0", checksum)
