"""One chunk of a tensor to bytes and back: repeated rows, a split into planes, a coder per plane.

The bytes are specified in docs/qatc-v3.md, "Chunks".
"""

import struct
from collections.abc import Callable

import numpy as np

from jaxquant.codecs.errors import CorruptError, UnsupportedError
from jaxquant.codecs.v3 import choose, coders, halves, nibbles, planes, symbols
from jaxquant.codecs.v3.coders import Buffer, Bytes, Lease, Take
from jaxquant.codecs.v3.planes import Words

RAW, CONSTANT, PLANES, NIBBLES, SYMBOLS = range(5)
SORTED = 16  # flag of symbols: columns are permuted

HEAD = struct.Struct("<BBBBII")  # kind, parameter, streams, reserved, columns, unique rows
STREAM = struct.Struct("<BI")  # coder, stored bytes
MAX_BYTES = 1 << 30  # of one decoded chunk
_MAX_STREAMS = 16
_ESCAPE_EVERY = 16  # words per exception, at least: what a decoder holds for them stays below its output


class _Streams:
    """The planes of a chunk being written, and how to code them: noise is looked at closely only where values recur."""

    def __init__(self, levels: tuple[int, ...], recurring: bool, take: Take) -> None:
        self.levels, self.recurring, self.take = levels, recurring, take
        self.coded: list[tuple[int, Buffer]] = []

    def add(self, plane: Bytes) -> None:
        self.coded.append(coders.encode(plane, self.levels))

    def add_noise(self, plane: Bytes) -> None:
        code = coders.encode if self.recurring else coders.encode_noise
        self.coded.append(code(plane, self.levels))

    def add_planes(self, words: Words, count: int) -> None:
        for index in range(count):
            self.add_noise(planes.split(words, index, self.take))


def bound(raw_bytes: int) -> int:
    """Return the most bytes that a chunk of `raw_bytes` may take: no encoder needs more than raw."""
    return HEAD.size + raw_bytes


def _assemble(kind: int, parameter: int, cols: int, unique: int, coded: list[tuple[int, Buffer]]) -> list[Buffer]:
    head = HEAD.pack(kind, parameter, len(coded), 0, cols, unique)
    table = b"".join(STREAM.pack(coder, len(body)) for coder, body in coded)
    return [head + table, *(body for _, body in coded)]


def _size(parts: list[Buffer]) -> int:
    return sum(len(part) for part in parts)


def _row_keys(rows: np.ndarray, indices: np.ndarray | slice) -> np.ndarray:
    """Hash rows of 64-bit words by six of them; equality is checked later."""
    picked = range(0, rows.shape[1], max(1, rows.shape[1] // 6))[:6]
    keys = rows[indices, 0].copy()
    for column in picked[1:]:
        keys *= np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(29)
        keys += rows[indices, column]
    return keys


def _repeated_rows(words: Words, cols: int) -> tuple[Words, np.ndarray] | None:
    """Return the distinct rows in order of first use and each row's place among them, if many repeat."""
    count = words.size // cols
    if count < 32 or (cols * words.itemsize) % 8:
        return None
    rows = words.view(np.uint64).reshape(count, -1)
    step = max(1, count // 512)
    sampled = np.arange(0, count, step)
    if np.unique(_row_keys(rows, slice(None, None, step))).size > (1 - 0.1 / step) * sampled.size:
        return None
    _, first, place = np.unique(_row_keys(rows, slice(None)), return_index=True, return_inverse=True)
    if first.size > 0.95 * count:
        return None
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(order.size)
    place = rank[place.reshape(-1)]
    distinct = rows[first[order]]
    if any(not np.array_equal(rows[at : at + 512], distinct[place[at : at + 512]]) for at in range(0, count, 512)):
        return None  # two different rows share a key
    return distinct.reshape(-1).view(words.dtype), place


def _encode_split(
    words: Words, cols: int, split: Bytes | symbols.Model | int, streams: _Streams
) -> tuple[int, int] | None:
    """Add the streams of one split; return the chunk's kind and parameter, or None if exceptions are too many."""
    if isinstance(split, int):
        streams.add_planes(planes.difference(words, cols, split), words.itemsize)
        return PLANES, split
    if isinstance(split, symbols.Model):
        coded, low, escapes = symbols.split(words, split, streams.take)
        model = split.base | (split.against_previous >> np.uint16(1))
        streams.add_planes(model, 2)
        streams.add(np.frombuffer(struct.pack("<I", split.tile), np.uint8))
        kind, parameter = SYMBOLS, split.shift
        if split.order is not None:
            parameter |= SORTED
            streams.add_planes(split.order.astype(np.uint16), 2)
    else:
        coded, low, escapes = nibbles.split(words, split, streams.take)
        streams.add(split)
        kind, parameter = NIBBLES, 0
    if escapes.high.size * _ESCAPE_EVERY > words.size:
        return None
    streams.add(np.frombuffer(struct.pack("<I", escapes.high.size), np.uint8))
    streams.add(halves.pack_escapes(escapes))
    streams.add(coded)
    streams.add_noise(low)
    streams.add_planes(words, words.itemsize - 2)
    return kind, parameter


def encode(
    words: Words, cols: int, exponent_bits: int, profile: choose.Profile, lease: Lease | None = None
) -> list[Buffer]:
    """Encode the words of one chunk.

    Args:
        words: flat, contiguous, not empty.
        cols: words per row; divides the number of words.
        exponent_bits: of the number format, 0 for integers.
        profile: what may be spent.
        lease: holds the memory of the planes; to be ended when they are written.

    Returns:
        Buffers whose concatenation is the chunk; some may be views of `words`.
    """
    raw: list[Buffer] = [HEAD.pack(RAW, 0, 0, 0, cols, words.size // cols), words.view(np.uint8)]
    if words[0] == words[-1] and words.size > 1 and words.max() == words.min():
        constant: list[Buffer] = [HEAD.pack(CONSTANT, 0, 0, 0, cols, words.size // cols), words[:1].tobytes()]
        return min(constant, raw, key=_size)
    recurring = choose.recurring(words, cols)
    repeated = _repeated_rows(words, cols) if recurring else None
    inner = words if repeated is None else repeated[0]
    best, lease = raw, lease or Lease()
    if repeated is not None:
        recurring = choose.recurring(inner, cols)
    levels = profile.levels if recurring or not profile.hasty else profile.levels[:1]
    for plan in choose.plans(inner, cols, exponent_bits, recurring, profile, distinct=repeated is not None):
        if plan.bits > 7.95 * words.itemsize and repeated is None:
            continue
        if profile.hasty and plan.bits * inner.size > 8 * _size(best):
            continue
        streams = _Streams(levels, recurring, lease.take)
        if repeated is not None:
            streams.add_planes(repeated[1].astype(np.uint32), 4)
        made = _encode_split(inner, cols, plan.split, streams)
        if made is not None:
            width = plan.split.size if isinstance(plan.split, np.ndarray) else cols
            best = min(best, _assemble(*made, width, inner.size // width, streams.coded), key=_size)
        lease.keep(best)
    return best


class _Planes:
    """The planes of a chunk being read, in order."""

    def __init__(self, body: Bytes, count: int) -> None:
        table = HEAD.size + count * STREAM.size
        if body.size < table:
            raise CorruptError("a chunk ends inside its stream table")
        self.entries = list(STREAM.iter_unpack(body[HEAD.size : table].tobytes()))
        self.body, self.at, self.index = body, table, 0
        if table + sum(size for _, size in self.entries) != body.size:
            raise CorruptError("the streams of a chunk do not fill it")

    def take(self, size: int) -> Bytes:
        """Decode the next plane, which must hold `size` bytes."""
        if self.index == len(self.entries):
            raise CorruptError("a chunk has too few streams")
        coder, stored = self.entries[self.index]
        coded = self.body[self.at : self.at + stored]
        self.index, self.at = self.index + 1, self.at + stored
        return coders.decode(coder, coded, size)

    def take_words(self, out: Words, count: int) -> None:
        """Fill `out` from the next `count` byte planes."""
        if count:
            planes.merge([self.take(out.size) for _ in range(count)], out)

    def take_number(self) -> int:
        return int.from_bytes(self.take(4).tobytes(), "little")

    def close(self) -> None:
        if self.index != len(self.entries):
            raise CorruptError("a chunk has streams left over")


def _decode_planes(source: _Planes, parameter: int, cols: int, out: Words) -> None:
    if parameter & ~planes.ORDERED > planes.XOR:
        raise UnsupportedError(f"predictor {parameter} is unknown")
    source.take_words(out, out.itemsize)
    if parameter:
        np.copyto(out, planes.undo_difference(out, cols, parameter))


def _take_escapes(source: _Planes, words: int) -> halves.Escapes:
    count = source.take_number()
    if count * _ESCAPE_EVERY > words:
        raise CorruptError(f"a chunk of {words} words lists {count} exceptions")
    return halves.unpack_escapes(source.take(5 * count), words)


def _decode_nibbles(source: _Planes, parameter: int, cols: int, out: Words) -> None:
    if out.itemsize == 1 or parameter:
        raise CorruptError("paired exponents need words of 2 bytes or more and no parameter")
    base = source.take(cols)
    escapes = _take_escapes(source, out.size)
    packed, noise = source.take((out.size // cols + 1) // 2 * cols), source.take(out.size)
    source.take_words(out, out.itemsize - 2)
    nibbles.merge(packed, noise, base, escapes, out)


def _decode_symbols(source: _Planes, parameter: int, cols: int, out: Words) -> None:
    shift = parameter & ~SORTED
    if shift not in (4, 8) or (shift == 4 and out.itemsize == 1):
        raise CorruptError(f"symbols with the parameter {parameter} in words of {out.itemsize} bytes")
    rows = out.size // cols
    packed = np.empty(cols, np.uint16)
    source.take_words(packed, 2)
    tile = source.take_number()
    if not tile or cols % tile:
        raise CorruptError(f"tiles of {tile} columns do not fit {cols}")
    order = None
    if parameter & SORTED:
        listed = np.empty(cols, np.uint16)
        source.take_words(listed, 2)
        order = listed.astype(np.intp)
        if cols > 1 << 16 or not np.array_equal(np.sort(order), np.arange(cols)):
            raise CorruptError("the order of columns is not a permutation")
    against = (packed & np.uint16(0x4000)) << np.uint16(1)
    model = symbols.Model(shift, packed & np.uint16(0x3FFF), against, tile, order)
    escapes = _take_escapes(source, out.size if shift == 4 else 0)
    coded = source.take(out.size)
    low = source.take((rows + 1) // 2 * cols if shift == 4 else out.size * (out.itemsize > 1))
    source.take_words(out, max(0, out.itemsize - 2))
    symbols.merge(coded, low, model, escapes, out)


_DECODERS: dict[int, Callable[[_Planes, int, int, Words], None]] = {
    PLANES: _decode_planes,
    NIBBLES: _decode_nibbles,
    SYMBOLS: _decode_symbols,
}


def decode(body: Bytes, out: Words) -> None:
    """Decode one chunk into `out`, whose size is that of the chunk.

    Raises:
        CorruptError: the chunk contradicts itself or its size.
        UnsupportedError: its kind is not known.
    """
    if body.size < HEAD.size:
        raise CorruptError(f"a chunk of {body.size} bytes is shorter than its header")
    kind, parameter, streams, reserved, cols, unique = HEAD.unpack(body[: HEAD.size].tobytes())
    if reserved or not cols or out.size % cols or not 0 < unique <= out.size // cols or streams > _MAX_STREAMS:
        raise CorruptError(f"the header of a chunk of {out.size} words is inconsistent")
    if kind in (RAW, CONSTANT):
        values = body[HEAD.size :]
        if values.size != (out.nbytes if kind == RAW else out.itemsize) or streams or parameter:
            raise CorruptError(f"{values.size} bytes of plain values for {out.size} words of {out.itemsize} bytes")
        np.copyto(out.view(np.uint8).reshape(-1, values.size), values)
        return
    decoder = _DECODERS.get(kind)
    if decoder is None:
        raise UnsupportedError(f"chunk kind {kind} is unknown")
    source = _Planes(body, streams)
    rows = out.size // cols
    if unique == rows:
        decoder(source, parameter, cols, out)
    else:
        place = np.empty(rows, np.uint32)
        source.take_words(place, 4)
        if place.max() >= unique:
            raise CorruptError(f"row {place.max()} of {unique} distinct rows is referred to")
        distinct = np.empty(unique * cols, out.dtype)
        decoder(source, parameter, cols, distinct)
        np.take(distinct.reshape(unique, cols), place, axis=0, out=out.reshape(rows, cols), mode="clip")
    source.close()
