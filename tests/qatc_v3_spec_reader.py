"""A second reader of QATC v3, written from docs/qatc-v3.md alone, slow and plain, to prove that the page is enough.

It shares nothing with jaxquant. It trusts the file where the package's reader must not, but checks what the page calls
an invariant wherever that takes one line.
"""

import struct
from typing import NamedTuple

import ml_dtypes
import numpy as np
import xxhash
import zstandard


class Chunk(NamedTuple):
    """A record of the index."""

    offset: int
    checksum: int
    rows: int
    length: int


def read(file: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the tensors and the metadata of a file."""
    magic, version, reserved, committed, checksum = struct.unpack("<4sB3sQQ", file[:24])
    assert (magic, version, reserved) == (b"QATC", 3, bytes(3))
    assert checksum == xxhash.xxh3_64_intdigest(file[:16])
    end = committed or len(file)
    footer = file[end - 32 : end]
    offset, length, checksum, magic = struct.unpack("<QQQ8s", footer)
    assert magic == b"QATC3END"
    assert offset + length + 32 == end
    index = file[offset : offset + length]
    assert checksum == xxhash.xxh3_64_intdigest(index + footer[:16])
    return _index(file, index)


def _index(file: bytes, index: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    pairs, count = struct.unpack_from("<II", index)
    at, texts, tensors = 8, [], {}
    for _ in range(2 * pairs):
        (size,) = struct.unpack_from("<I", index, at)
        texts.append(index[at + 4 : at + 4 + size].decode())
        at += 4 + size
    for _ in range(count):
        name_size, dtype_size, axes, token_axis, chunk_count = struct.unpack_from("<IBBBI", index, at)
        at += 11
        name, at = index[at : at + name_size].decode(), at + name_size
        dtype, at = index[at : at + dtype_size].decode(), at + dtype_size
        shape, at = struct.unpack_from(f"<{axes}Q", index, at), at + 8 * axes
        chunks = [Chunk(*struct.unpack_from("<QQII", index, at + 24 * i)) for i in range(chunk_count)]
        at += 24 * chunk_count
        assert name not in tensors
        tensors[name] = _tensor(file, dtype, shape, token_axis, chunks)
    assert at == len(index)
    return tensors, dict(zip(texts[::2], texts[1::2], strict=True))


def _tensor(file: bytes, name: str, shape: tuple[int, ...], token_axis: int, chunks: list[Chunk]) -> np.ndarray:
    dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
    width = {"complex64": 4, "complex128": 8}.get(name, dtype.itemsize)
    row = int(np.prod(shape[token_axis + 1 :], dtype=object)) * dtype.itemsize // width
    parts = []
    for chunk in chunks:
        body = file[chunk.offset : chunk.offset + chunk.length]
        assert chunk.checksum == xxhash.xxh3_64_intdigest(body)
        parts.append(_chunk(body, chunk.rows * row, width))
    words = np.concatenate(parts) if parts else np.empty(0, f"<u{width}")
    return words.view(np.uint8).view(dtype).reshape(shape)


class Streams:
    """The streams of a chunk, one after the other."""

    def __init__(self, body: bytes, count: int) -> None:
        self.table = [struct.unpack_from("<BI", body, 12 + 5 * i) for i in range(count)]
        self.body, self.at = body, 12 + 5 * count
        assert self.at + sum(size for _, size in self.table) == len(body)

    def bytes(self, size: int) -> np.ndarray:
        """Decode the next stream, of a known size."""
        coder, stored = self.table.pop(0)
        coded, self.at = self.body[self.at : self.at + stored], self.at + stored
        if coder == 0:
            plain = coded
        elif coder == 1:
            plain = coded * size
        else:
            assert coder == 2
            assert zstandard.frame_content_size(coded) == size
            plain = zstandard.ZstdDecompressor().decompress(coded)
        assert len(plain) == size
        return np.frombuffer(plain, np.uint8)

    def words(self, count: int, planes: int) -> np.ndarray:
        """Decode a word plane list, as 64-bit integers."""
        out = np.zeros(count, np.uint64)
        for plane in range(planes):
            out |= self.bytes(count).astype(np.uint64) << np.uint64(8 * plane)
        return out

    def escapes(self, n: int) -> dict[int, int]:
        """Decode the escapes: word to its high bits."""
        count = int(self.bytes(4).view("<u4")[0])
        assert count <= n // 16
        packed = self.bytes(5 * count)
        gaps = sum(packed[i * count : (i + 1) * count].astype(np.int64) << 8 * i for i in range(4))
        return dict(zip(np.cumsum(gaps).tolist(), packed[4 * count :].tolist(), strict=True)) if count else {}


def _chunk(body: bytes, n: int, width: int) -> np.ndarray:
    kind, parameter, count, reserved, cols, unique = struct.unpack_from("<BBBBII", body)
    assert reserved == 0
    dtype = np.dtype(f"<u{width}")
    if kind == 0:
        return np.frombuffer(body[12:], dtype)
    if kind == 1:
        return np.repeat(np.frombuffer(body[12:], dtype), n)
    streams, rows = Streams(body, count), n // cols
    place = streams.words(rows, 4).astype(np.int64) if unique < rows else np.arange(rows)
    decode = {2: _planes, 3: _nibbles, 4: _symbols}[kind]
    distinct = decode(streams, parameter, unique, cols, width)
    assert not streams.table
    return distinct.reshape(unique, cols)[place].reshape(-1).astype(dtype)


def _planes(streams: Streams, parameter: int, rows: int, cols: int, width: int) -> np.ndarray:
    bits, predictor = 8 * width, parameter & 7
    top, mask = 1 << (bits - 1), (1 << bits) - 1
    d = [[int(x) for x in row] for row in streams.words(rows * cols, width).reshape(rows, cols)]
    if predictor in (1, 2):
        d = [[(x >> 1) ^ (-(x & 1) & mask) for x in row] for row in d]
        for _ in range(predictor):
            for r in range(1, rows):
                d[r] = [(x + y) & mask for x, y in zip(d[r], d[r - 1], strict=True)]
    elif predictor == 3:
        for r in range(1, rows):
            d[r] = [x ^ y for x, y in zip(d[r], d[r - 1], strict=True)]
    if parameter & 8:
        d = [[x ^ top if x & top else ~x & mask for x in row] for row in d]
    return np.array(d, np.uint64).reshape(-1)


def _paired(packed: np.ndarray, rows: int, cols: int) -> np.ndarray:
    pairs = packed.reshape(-1, cols)
    return np.array([pairs[r // 2] >> (4 if r % 2 else 0) & 15 for r in range(rows)], np.int64)


def _join(x: np.ndarray, streams: Streams, width: int) -> np.ndarray:
    """Put the top 16 bits over the low bytes."""
    if width == 1:
        return (x >> 8).astype(np.uint64)
    low = streams.words(x.size, width - 2)
    return x.astype(np.uint64) << np.uint64(8 * (width - 2)) | low


def _nibbles(streams: Streams, parameter: int, rows: int, cols: int, width: int) -> np.ndarray:
    assert parameter == 0
    base = streams.bytes(cols).astype(np.int64)
    escapes = streams.escapes(rows * cols)
    e = _paired(streams.bytes((rows + 1) // 2 * cols), rows, cols).reshape(-1)
    noise = streams.bytes(rows * cols).astype(np.int64)
    for word, high in escapes.items():
        e[word] |= high * 16
    exponent = (e + np.tile(base, rows)) % 256
    return _join((noise & 128) << 8 | exponent << 7 | noise & 127, streams, width)


def _symbols(streams: Streams, parameter: int, rows: int, cols: int, width: int) -> np.ndarray:
    shift, is_sorted, n = parameter & 15, parameter & 16, rows * cols
    model = streams.words(cols, 2).astype(np.int64)
    tile = int(streams.bytes(4).view("<u4")[0])
    order = streams.words(cols, 2).astype(np.int64) if is_sorted else np.arange(cols)
    escapes = streams.escapes(n if shift == 4 else 0)
    laid = streams.bytes(n).reshape(cols // tile, rows, tile).transpose(1, 0, 2).reshape(rows, cols)
    symbol = np.zeros((rows, cols), np.int64)
    symbol[:, order] = laid
    symbol, b = symbol.reshape(-1), np.tile(model & 0x3FFF, rows)
    if shift == 4:
        low = _paired(streams.bytes((rows + 1) // 2 * cols), rows, cols).reshape(-1)
        y = symbol & 127 | (symbol & 128) << 4
        for word, high in escapes.items():
            y[word] |= high << 7
        x = ((y + b) << 4 | low) % (1 << 16)
    else:
        low = streams.bytes(n if width > 1 else 0).astype(np.int64)
        x = ((symbol + b) << 8) % (1 << 16)
        if width > 1:
            x |= low
    x = x.reshape(rows, cols)
    against = (model & 1 << 14) > 0
    for r in range(1, rows):
        x[r, against] ^= x[r - 1, against] & 0x8000
    return _join(x.reshape(-1), streams, width)
