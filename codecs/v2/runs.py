"""QATC's three run-length grammars: where the runs are, how many bytes they take, their bytes, and back.

Encoding and decoding work on whole arrays of runs, so that neither constant planes nor noise are slow; only the walk
from token to token is a Python loop, over the few bytes that are tokens.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from jaxquant.codecs import errors

ZERO, RAW, REPEAT = 0, 1, 2
_BLOCK = 1 << 14
_WINDOW = 1 << 18


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grammar:
    """How tokens are written: `header` bytes, for elements of `width` bytes, repeats of at least `threshold`."""

    threshold: int
    cap: int
    header: int
    width: int = 1
    kinds: int = 3


LONG = Grammar(threshold=4, cap=65535, header=3)
PACKED = Grammar(threshold=3, cap=64, header=1)
WORDS = Grammar(threshold=1 << 62, cap=65535, header=3, width=4, kinds=2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runs:
    """Tokens in order: kind, first source element and length of each."""

    kind: np.ndarray
    start: np.ndarray
    length: np.ndarray

    def nbytes(self, grammar: Grammar) -> int:
        """Return the encoded size of these tokens in bytes."""
        literal = int(self.length[self.kind == RAW].sum())
        return grammar.header * self.kind.size + grammar.width * literal + int(np.count_nonzero(self.kind == REPEAT))


def encode(source: np.ndarray, grammar: Grammar) -> bytes:
    """Write bytes as QATQ's greedy encoder does."""
    return b"".join(write(window, found, grammar) for window, found in _windows(source, grammar))


def size(source: np.ndarray, grammar: Grammar) -> int:
    """Return `len(encode(source, grammar))` without writing it."""
    return sum(found.nbytes(grammar) for _, found in _windows(source, grammar))


def at_least(source: np.ndarray, grammar: Grammar) -> int:
    """Return a cheap lower bound of `size`: bytes that must be literals, and headers that must stand before them."""
    filled = source != 0
    changes = source[1:] != source[:-1]
    alone = filled.copy()
    alone[1:] &= changes
    alone[:-1] &= changes
    runs = int(np.count_nonzero(filled[:-1] & ~filled[1:])) + int(np.count_nonzero(alone[1:] & ~filled[:-1]))
    return int(np.count_nonzero(alone)) + grammar.header * runs


def _windows(source: np.ndarray, grammar: Grammar) -> Iterator[tuple[np.ndarray, Runs]]:
    """Split a long source with bounded memory: only the last token of a window can depend on what follows it."""
    first = 0
    while first < source.size:
        window = source[first : first + _WINDOW]
        found = find(window, grammar)
        if first + window.size < source.size:
            found = Runs(kind=found.kind[:-1], start=found.start[:-1], length=found.length[:-1])
        yield window, found
        first += int(found.start[-1] + found.length[-1])


def find(source: np.ndarray, grammar: Grammar) -> Runs:
    """Split a source into the tokens that QATQ's greedy encoder writes.

    Args:
        source: Bytes, or 32-bit words for `WORDS`; one axis.
        grammar: Threshold of a repeat and longest token.

    Returns:
        The tokens, covering the source exactly.
    """
    if source.size == 0:
        return Runs(kind=np.empty(0, np.uint8), start=np.empty(0, np.int64), length=np.empty(0, np.int64))
    first = np.append(0, np.flatnonzero(source[1:] != source[:-1]) + 1)
    length = np.diff(first, append=source.size)
    zero = source[first] == 0
    repeats = ~zero & (length >= grammar.threshold)
    # What is left of a repeat after tokens of full length is a repeat only if it is still long enough.
    rest = np.where(repeats, length % grammar.cap, 0)
    rest[rest >= grammar.threshold] = 0
    covered = np.where(zero | repeats, length - rest, 0)
    literal = length - covered
    # Literals that touch are one token: it starts where none goes on, and ends where none follows.
    joined = (literal[:-1] > 0) & (covered[1:] == 0)
    heads = np.flatnonzero((literal > 0) & ~np.append(False, joined))
    tails = np.flatnonzero((literal > 0) & ~np.append(joined, False))
    sums = np.append(0, np.cumsum(literal))
    # Every run gives at most one token of its own and the head of one literal after it, in this order.
    kind = np.full((first.size, 2), RAW, np.uint8)
    kind[:, 0] = np.where(zero, ZERO, REPEAT)
    start = np.stack([first, first + covered], axis=1)
    total = np.stack([covered, np.zeros_like(covered)], axis=1)
    total[heads, 1] = sums[tails + 1] - sums[heads]
    taken = total > 0
    return _cap(kind[taken], start[taken], total[taken], grammar.cap)


def _cap(kind: np.ndarray, start: np.ndarray, length: np.ndarray, cap: int) -> Runs:
    """Split tokens longer than `cap`."""
    pieces = -(-length // cap)
    index = np.repeat(np.arange(kind.size), pieces)
    offset = (np.arange(index.size) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * cap
    return Runs(kind=kind[index], start=start[index] + offset, length=np.minimum(length[index] - offset, cap))


def write(source: np.ndarray, runs: Runs, grammar: Grammar) -> bytes:
    """Return the encoded bytes of tokens.

    Args:
        source: The bytes that were split; for `WORDS` the same words as big-endian bytes.
        runs: Where the tokens are.
        grammar: How to write them.
    """
    data = np.where(runs.kind == RAW, runs.length * grammar.width, (runs.kind == REPEAT).astype(np.int64))
    position = np.cumsum(data + grammar.header) - data - grammar.header
    encoded = np.empty(int(data.sum()) + grammar.header * data.size, np.uint8)
    if grammar.header == 1:
        encoded[position] = (runs.kind << 6) | (runs.length - 1).astype(np.uint8)
    else:
        encoded[position] = runs.kind
        encoded[position + 1] = (runs.length >> 8).astype(np.uint8)
        encoded[position + 2] = (runs.length & 255).astype(np.uint8)
    encoded[_spans(position + grammar.header, data)] = source[_spans(runs.start * grammar.width, data)]
    return encoded.tobytes()


def _spans(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Concatenate `arange(s, s + l)` over all spans."""
    ends = np.cumsum(length)
    return np.arange(int(ends[-1]) if ends.size else 0) + np.repeat(start - ends + length, length)


def read(body: np.ndarray, out: np.ndarray, grammar: Grammar, where: str) -> None:
    """Fill `out` from tokens that must cover it exactly.

    Args:
        body: Encoded bytes.
        out: Bytes to fill; for `WORDS` those of big-endian words.
        grammar: How the tokens are written.
        where: Place of the body, for messages.

    Raises:
        CorruptError: The tokens do not produce exactly `out`, or bytes are left over.
    """
    done = position = 0
    while done < out.size:
        tokens, kinds, lengths = _tokens(body, position, grammar, where)
        totals = done + np.cumsum(lengths)
        if totals[-1] > out.size:
            at = int(np.searchsorted(totals, out.size, "right"))
            raise errors.CorruptError(
                f"{where}, offset {int(tokens[at])}: run of {int(lengths[at])} bytes passes the end of {out.size}"
            )
        data = np.where(kinds == RAW, lengths, kinds == REPEAT)
        position = int(tokens[-1] + grammar.header + data[-1])
        if position > body.size:
            raise errors.CorruptError(f"{where}, offset {int(tokens[-1])}: run reads past the end of the body")
        _fill(body, out[done : int(totals[-1])], kinds, lengths, tokens + grammar.header)
        done = int(totals[-1])
    if position != body.size:
        raise errors.CorruptError(f"{where}, offset {position}: {body.size - position} bytes after the last run")


def _tokens(body: np.ndarray, position: int, grammar: Grammar, where: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offsets, kinds and decoded lengths of the tokens that start in the next block of the body, at least one."""
    size = min(_BLOCK, body.size - position - grammar.header + 1)
    if size <= 0:
        raise errors.CorruptError(f"{where}, offset {position}: body ends where a run is expected")
    head = body[position : position + size]
    if grammar.header == 1:
        kind, count = head >> 6, (head & 63).astype(np.int64) + 1
    else:
        kind = head
        count = body[position + 1 : position + 1 + size].astype(np.int64) << 8
        count |= body[position + 2 : position + 2 + size]
    length = count * grammar.width
    after = np.arange(grammar.header, size + grammar.header)
    after += np.where(kind == RAW, length, kind == REPEAT)
    chain, follow, at = [], after.tolist(), 0
    while at < size:
        chain.append(at)
        at = follow[at]
    tokens = np.array(chain)
    bad = (kind[tokens] >= grammar.kinds) | (count[tokens] == 0)
    if bad.any():
        at = tokens[int(np.argmax(bad))]
        raise errors.CorruptError(
            f"{where}, offset {position + int(at)}: run of kind {int(kind[at])} and length {int(count[at])}"
        )
    return tokens + position, kind[tokens], length[tokens]


def _fill(body: np.ndarray, out: np.ndarray, kinds: np.ndarray, lengths: np.ndarray, data: np.ndarray) -> None:
    """Expand tokens whose data start at `data` into `out`: by slices if they are long, by one gather if not."""
    ends = np.cumsum(lengths)
    if out.size >= 32 * kinds.size:
        out[:] = 0
        for kind, end, length, at in zip(kinds.tolist(), ends.tolist(), lengths.tolist(), data.tolist(), strict=True):
            if kind == RAW:
                out[end - length : end] = body[at : at + length]
            elif kind == REPEAT:
                out[end - length : end] = body[at]
        return
    index = np.repeat(data, lengths)
    raw = np.repeat(kinds == RAW, lengths)
    index[raw] += (np.arange(out.size) - np.repeat(ends - lengths, lengths))[raw]
    zero = np.repeat(kinds == ZERO, lengths)
    index[zero] = 0
    np.take(body, index, out=out)
    out[zero] = 0
