"""The bytes around the chunks of a QATC v3 file: header, index, footer.

Specified in docs/qatc-v3.md. Parsing trusts nothing: every count and length is checked against the bytes that are
there and against the caller's limits before anything is allocated from it.
"""

import math
import struct
from dataclasses import dataclass, field

import numpy as np
import xxhash

from jaxquant.codecs.errors import CorruptError, LimitError, UnsupportedError
from jaxquant.codecs.limits import Limits
from jaxquant.codecs.v3 import chunks, dtypes

MAGIC = b"QATC"
VERSION = 3
_HEADER = struct.Struct("<4sBBHQQ")  # magic, version, reserved, reserved, committed bytes, checksum
_FOOTER = struct.Struct("<QQQ8s")  # index offset, index bytes, checksum, magic
_END = b"QATC3END"
HEADER_BYTES, FOOTER_BYTES = _HEADER.size, _FOOTER.size

CHUNK = np.dtype([("offset", "<u8"), ("checksum", "<u8"), ("rows", "<u4"), ("length", "<u4")])
MAX_DIMS = 32


@dataclass
class Tensor:
    """One named array: `prod(shape[: axis + 1])` rows, stored as chunks of consecutive rows.

    Attributes:
        name: unique in its file.
        dtype: stored name of the number format.
        shape: sizes of all axes.
        axis: the token axis: rows are indexed by it and by the axes before it.
        chunks: records of `CHUNK`, in order of their rows.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    axis: int
    chunks: np.ndarray = field(default_factory=lambda: np.empty(0, CHUNK))

    @property
    def rows(self) -> int:
        """How many rows the tensor has."""
        return math.prod(self.shape[: self.axis + 1])

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape[self.axis + 1 :]) * dtypes.FORMATS[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded tensor."""
        return self.rows * self.row_bytes

    @property
    def stored_bytes(self) -> int:
        """Bytes of its chunks in the file."""
        return int(self.chunks["length"].sum(dtype=np.uint64))


def header(committed: int = 0) -> bytes:
    """Return the header of a file whose valid part is `committed` bytes, or the whole file if 0."""
    start = struct.pack("<4sBBHQ", MAGIC, VERSION, 0, 0, committed)
    return start + struct.pack("<Q", xxhash.xxh3_64_intdigest(start))


def parse_header(data: bytes) -> int:
    """Return how many bytes of the file are committed, 0 meaning all.

    Raises:
        UnsupportedError: not QATC, or another version.
        CorruptError: too short, or the checksum differs.
    """
    if data[:4] != MAGIC[: len(data)]:
        raise UnsupportedError(f"the file starts with {bytes(data[:4])!r}, not with {MAGIC!r}")
    if len(data) > 4 and data[4] != VERSION:
        raise UnsupportedError(f"this is QATC version {data[4]}, not {VERSION}")
    if len(data) < HEADER_BYTES:
        raise CorruptError(f"{len(data)} bytes are fewer than the {HEADER_BYTES} of a header")
    _, _, flags, reserved, committed, checksum = _HEADER.unpack(data)
    if checksum != xxhash.xxh3_64_intdigest(data[:16]):
        raise CorruptError("the checksum of the header differs")
    if flags or reserved:
        raise UnsupportedError("reserved bytes of the header are not zero")
    return committed


def footer(index: bytes, offset: int) -> bytes:
    """Return the footer for an index stored at `offset`."""
    place = struct.pack("<QQ", offset, len(index))
    return place + struct.pack("<Q8s", _checksum(index, place), _END)


def _checksum(index: bytes, place: bytes) -> int:
    state = xxhash.xxh3_64(index)
    state.update(place)
    return state.intdigest()


def parse_footer(data: bytes, end: int, limits: Limits) -> tuple[int, int]:
    """Return offset and length of the index of a file whose valid part is `end` bytes.

    Raises:
        CorruptError: there is no footer, or it contradicts the file's size.
        LimitError: the index is longer than the limits can need.
    """
    offset, length, _, magic = _FOOTER.unpack(data)
    if magic != _END:
        raise CorruptError("the file has no footer: it was cut short or is still being written")
    if offset < HEADER_BYTES or offset + length + FOOTER_BYTES != end:
        raise CorruptError(f"an index of {length} bytes at {offset} does not fit a file of {end} bytes")
    allowed = limits.text_bytes + CHUNK.itemsize * limits.chunks + (16 + 8 * MAX_DIMS) * (limits.tensors + 1)
    if length > allowed:
        raise LimitError(f"an index of {length} bytes exceeds the {allowed} that the limits allow for")
    return offset, length


def index(tensors: list[Tensor], metadata: dict[str, str]) -> bytes:
    """Serialise the index."""
    parts = [struct.pack("<II", len(metadata), len(tensors))]
    for text in (text for pair in metadata.items() for text in pair):
        encoded = text.encode()
        parts.append(struct.pack("<I", len(encoded)) + encoded)
    for tensor in tensors:
        name, dtype = tensor.name.encode(), tensor.dtype.encode()
        sizes = struct.pack("<IBBBI", len(name), len(dtype), len(tensor.shape), tensor.axis, len(tensor.chunks))
        shape = struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape)
        parts += [sizes, name, dtype, shape, tensor.chunks.tobytes()]
    return b"".join(parts)


class _Cursor:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise CorruptError("the index ends early")
        self.at += size
        return self.data[self.at - size : self.at]

    def numbers(self, layout: str) -> tuple[int, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def text(self, size: int) -> str:
        try:
            return self.take(size).decode()
        except UnicodeDecodeError:
            raise CorruptError("a name or metadata of the index is not UTF-8") from None


def _parse_tensor(cursor: _Cursor) -> Tensor:
    name_size, dtype_size, ndim, axis, count = cursor.numbers("<IBBBI")
    name, dtype = cursor.text(name_size), cursor.text(dtype_size)
    if ndim > MAX_DIMS or axis >= max(ndim, 1):
        raise CorruptError(f"tensor {name!r} has {ndim} axes and tokens on axis {axis}")
    if dtype not in dtypes.FORMATS:
        raise UnsupportedError(f"tensor {name!r} has the unknown dtype {dtype!r}")
    shape = cursor.numbers(f"<{ndim}Q")
    return Tensor(name, dtype, shape, axis, np.frombuffer(cursor.take(count * CHUNK.itemsize), CHUNK))


def _check_chunks(tensor: Tensor) -> None:
    if math.prod(max(size, 1) for size in tensor.shape) * dtypes.FORMATS[tensor.dtype].itemsize >= 1 << 63:
        raise CorruptError(f"tensor {tensor.name!r} has the impossible shape {tensor.shape}")
    rows = tensor.chunks["rows"]
    expected = tensor.rows if tensor.row_bytes else 0
    if int(rows.sum(dtype=np.uint64)) != expected or (rows.size and not rows.all()):
        raise CorruptError(f"the chunks of tensor {tensor.name!r} do not hold its {expected} rows")
    if not rows.size:
        return
    if int(rows.max()) * tensor.row_bytes > chunks.MAX_BYTES:
        raise CorruptError(f"a chunk of tensor {tensor.name!r} claims more than {chunks.MAX_BYTES} bytes")
    if (tensor.chunks["length"] > chunks.bound(0) + rows.astype(np.uint64) * tensor.row_bytes).any():
        raise CorruptError(f"a chunk of tensor {tensor.name!r} is longer than its raw values")


def _check_places(tensors: list[Tensor], end: int) -> None:
    """Chunks lie between header and index and do not overlap."""
    records = np.concatenate([tensor.chunks for tensor in tensors]) if tensors else np.empty(0, CHUNK)
    starts = records["offset"]
    if (starts < HEADER_BYTES).any() or (starts > end).any() or (starts + records["length"] > end).any():
        raise CorruptError("a chunk lies outside of the file")
    order = np.argsort(starts, kind="stable")
    if (starts[order][1:] < (starts + records["length"])[order][:-1]).any():
        raise CorruptError("two chunks overlap")


def parse_index(data: bytes, place: bytes, limits: Limits) -> tuple[list[Tensor], dict[str, str]]:
    """Parse and validate the index.

    Args:
        data: the index.
        place: the footer.
        limits: what the file may claim.

    Raises:
        CodecError: any of its three kinds.
    """
    offset, _, checksum, _ = _FOOTER.unpack(place)
    if checksum != _checksum(data, place[:16]):
        raise CorruptError("the checksum of the index differs")
    cursor = _Cursor(data)
    pairs, count = cursor.numbers("<II")
    if count > limits.tensors:
        raise LimitError(f"{count} tensors exceed the limit of {limits.tensors}")
    if 8 * pairs > len(data) or 11 * count > len(data):
        raise CorruptError(f"an index of {len(data)} bytes claims {pairs} pairs of metadata and {count} tensors")
    texts = [cursor.text(cursor.numbers("<I")[0]) for _ in range(2 * pairs)]
    metadata = dict(zip(texts[::2], texts[1::2], strict=True))
    tensors, chunk_count, total = [], 0, 0
    for _ in range(count):
        tensor = _parse_tensor(cursor)
        tensors.append(tensor)
        chunk_count += len(tensor.chunks)
        total += tensor.nbytes
        if total > limits.decoded_bytes:
            raise LimitError(f"tensors of {total} bytes or more exceed the limit of {limits.decoded_bytes}")
        if chunk_count > limits.chunks:
            raise LimitError(f"{chunk_count} chunks exceed the limit of {limits.chunks}")
        _check_chunks(tensor)
    if cursor.at != len(data):
        raise CorruptError("bytes follow the last tensor of the index")
    written = sum(len(text.encode()) for text in texts) + sum(len(tensor.name.encode()) for tensor in tensors)
    if written > limits.text_bytes:
        raise LimitError(f"{written} bytes of names and metadata exceed the limit of {limits.text_bytes}")
    if len(metadata) != pairs or len({tensor.name for tensor in tensors}) != count:
        raise CorruptError("a name or a key of metadata occurs twice")
    _check_places(tensors, offset)
    return tensors, metadata
