"""FNV-1a, 64 bit: QATC's checksum, a sequential multiply and xor, computed here on thousands of lanes at once.

`h' = ((h ^ byte) * p) mod 2**64`. Two facts make lanes possible although every step needs the one before:

* the xor touches only the low byte, so with `d = (low ^ byte) - low` a step is linear, `h' = (h + d) * p`, and
  `n` steps are `h p**n + sum_i d_i p**(n - i)`: lanes combine as soon as their `d` are known;
* the low byte alone is an automaton, `low' = (low ^ byte) * 0xB3 mod 256`, and bit k of it depends on bits 0 to k only.
  Run every lane from a start whose bits below k are right: bit k at its end is wrong exactly if bit k at its start
  was, so one prefix xor over the lanes corrects all of them. Bits 0 and 1 are plain parities.

Source: Fowler, Noll and Vo, "The FNV Non-Cryptographic Hash Algorithm", IETF draft-eastlake-fnv.
"""

import functools
import importlib.util
import sys
import types
from collections.abc import Iterable

import numpy as np

OFFSET = 0xCBF29CE484222325
PRIME = 0x100000001B3
MASK = (1 << 64) - 1
_LANES, _STEPS = 16384, 32
_SMALL = 8192
_XLA_BLOCK = 4 << 20
_XLA_IMPORT = 64 << 20
_XLA_ROWS = 8
_XLA_WORDS = 1 << 12


def fnv1a(data, state: int = OFFSET) -> int:
    """Hash a buffer, continuing from an earlier state.

    Args:
        data: Any C-contiguous buffer; its bytes are hashed in memory order.
        state: Hash of what came before.

    Returns:
        The 64-bit hash.

    Example:
        >>> f"{fnv1a(b'a'):016x}"
        'af63dc4c8601ec8c'
    """
    octets = np.frombuffer(data, np.uint8)
    return _stream(octets, state, _xla(octets.size))


def _stream(octets: np.ndarray, state: int, xla: types.ModuleType | None) -> int:
    """Hash bytes, by the compiled loops as far as they go if they are given."""
    start = 0
    if xla:
        with xla.wide():
            for steps in xla.STEPS:
                while octets.size - start >= (size := xla.LANES * steps):
                    words = octets[start : start + size].view(np.uint64).reshape(xla.LANES, -1)
                    state = _xla_lanes(xla, words, state)
                    start += size
    while (left := octets.size - start) >= _SMALL:
        lanes = min(left // _STEPS, _LANES)
        state = _lanes(octets[start : start + lanes * _STEPS].reshape(lanes, _STEPS), state)
        start += lanes * _STEPS
    for octet in octets[start:].tobytes():
        state = (state ^ octet) * PRIME & MASK
    return state


def fnv1a_parts(parts: Iterable, state: int = OFFSET) -> int:
    """Hash many buffers as if they were one, gathering small ones into blocks worth a call.

    Args:
        parts: C-contiguous buffers.
        state: Hash of what came before.

    Returns:
        The 64-bit hash.
    """
    block, filled, xla = np.empty(_XLA_BLOCK, np.uint8), 0, None
    for part in parts:
        octets = np.frombuffer(part, np.uint8)
        while octets.size:
            taken = octets[: block.size - filled]
            block[filled : filled + taken.size] = taken
            filled += taken.size
            octets = octets[taken.size :]
            if filled == block.size:
                xla = xla or _xla(block.size)
                state, filled = _stream(block, state, xla), 0
    return _stream(block[:filled], state, xla)


def fnv1a_rows(words: np.ndarray, *, swapped: bool = False) -> list[int]:
    """Hash every row of a matrix on its own.

    Args:
        words: uint16 or uint32, `[rows, n]`, C-contiguous.
        swapped: Hash 32-bit words most significant byte first.

    Returns:
        One hash per row.
    """
    octets = words.view(np.uint8)
    states, done = [OFFSET] * len(words), 0
    if len(words) >= _XLA_ROWS and (xla := _xla(words.nbytes)):
        wide, lanes = octets[:, : octets.shape[1] // 8 * 8].view(np.uint64), np.full(len(words), OFFSET, np.uint64)
        # Rows a power of two apart share their cache sets, so they are transposed from a copy with another pitch.
        pitched = np.empty((len(words), _XLA_WORDS + 8), np.uint64)[:, :_XLA_WORDS]
        with xla.wide():
            while wide.shape[1] - done >= _XLA_WORDS:
                np.copyto(pitched, wide[:, done : done + _XLA_WORDS])
                lanes = xla.hashes(lanes, xla.transposed(pitched), swapped=swapped)
                done += _XLA_WORDS
        states = lanes.tolist()
    tails = words[:, done * 8 // words.itemsize :]
    return [fnv1a_words(tail, state, swapped=swapped) for tail, state in zip(tails, states, strict=True)]


def hashes_rows_faster(words: np.ndarray, rows: int) -> bool:
    """Tell whether `fnv1a_rows` on so many rows of these words beats hashing them one after the other."""
    return rows >= _XLA_ROWS and _xla(words.nbytes) is not None


def fnv1a_words(words: np.ndarray, state: int = OFFSET, *, swapped: bool = False) -> int:
    """Hash unsigned words, optionally the most significant byte of each first."""
    if not swapped:
        return fnv1a(words, state)
    for first in range(0, words.size, 1 << 17):
        state = fnv1a(words[first : first + (1 << 17)].byteswap(), state)
    return state


def _xla(size: int) -> types.ModuleType | None:
    """The compiled loops, if they are worth it: JAX is there already, or is cheap next to the input and harmless.

    Importing JAX where it finds an accelerator would claim that accelerator's memory for a checksum.
    """
    if size < _XLA_BLOCK or ("jax" not in sys.modules and (size < _XLA_IMPORT or not _harmless())):
        return None
    from jaxquant.codecs.v2 import fnv_xla

    return fnv_xla


@functools.cache
def _harmless() -> bool:
    found = {name: importlib.util.find_spec(name) is not None for name in ("jax", "jax_plugins", "libtpu")}
    return found["jax"] and not (found["jax_plugins"] or found["libtpu"])


def _xla_lanes(xla, rows: np.ndarray, state: int) -> int:
    """Hash consecutive rows of words, one lane each, by the compiled loops."""
    words = xla.transposed(rows)
    starts = _low_bytes(xla.columns(words), state & 255, xla.low_bytes)
    return _combine(state, starts, xla.hashes(starts.astype(np.uint64), words), 8 * rows.shape[1])


def _lanes(rows: np.ndarray, state: int) -> int:
    """Hash consecutive rows of bytes, one lane each; their length is even."""
    columns = _columns(rows)
    starts = _low_bytes(columns, state & 255, _run_low_bytes)
    hashes = starts.astype(np.uint64)
    octets = np.empty(min(8192, hashes.size), np.uint64)
    for first in range(0, hashes.size, octets.size):
        part = hashes[first : first + octets.size]
        wide = octets[: part.size]
        for column in columns:
            np.copyto(wide, column[first : first + octets.size])
            np.bitwise_xor(part, wide, out=part)
            np.multiply(part, PRIME, out=part)
    return _combine(state, starts, hashes, rows.shape[1])


def _combine(state: int, starts: np.ndarray, hashes: np.ndarray, steps: int) -> int:
    """Chain the lanes' hashes, each computed from its low byte alone, onto the state before them."""
    missing = hashes - starts * np.uint64(pow(PRIME, steps, 1 << 64))
    tail = int((missing * _weights(starts.size, steps)).sum(dtype=np.uint64))
    return (state * pow(PRIME, steps * starts.size, 1 << 64) + tail) & MASK


def _columns(rows: np.ndarray) -> np.ndarray:
    """Transpose, by pairs of bytes because NumPy moves those twice as fast."""
    pairs = np.ascontiguousarray(rows.view(np.uint16).T)
    columns = np.empty(rows.shape[::-1], np.uint8)
    np.copyto(columns[0::2], pairs, casting="unsafe")
    np.right_shift(pairs, 8, out=pairs)
    np.copyto(columns[1::2], pairs, casting="unsafe")
    return columns


def _low_bytes(columns: np.ndarray, low: int, run) -> np.ndarray:
    """Low byte of the state at the start of every lane, bit by bit."""
    starts = np.zeros(columns.shape[1], np.uint8)
    even = np.bitwise_xor.reduce(columns[0::2], axis=0)
    odd = np.bitwise_xor.reduce(columns[1::2], axis=0)
    ends = (even ^ odd) & 1
    _correct(starts, ends, low, 0)
    # bit 1 of 3 m is m1 ^ m0, and m0 is the running parity of bit 0: over an even number of steps the start cancels
    # and a byte counts if an odd number of steps remains, its own included.
    _correct(starts, ((even ^ odd) & 2) ^ ((odd & 1) << 1), low, 1)
    # Two bits a pass: from both values of the lower one, of which the right one is known before the other is needed.
    for bit in (2, 4, 6):
        ends = run(np.stack([starts, starts | np.uint8(1 << bit)]), columns)
        _correct(starts, ends[0] & (1 << bit), low, bit)
        ends = np.where(starts & (1 << bit), ends[1], ends[0])
        _correct(starts, ends & (2 << bit), low, bit + 1)
    return starts


def _run_low_bytes(starts: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Run the low-byte automaton of every lane over all columns, from several starts."""
    ends = starts.copy()
    for column in columns:
        np.bitwise_xor(ends, column, out=ends)
        np.multiply(ends, PRIME & 255, out=ends)
    return ends


def _correct(starts: np.ndarray, ends: np.ndarray, low: int, bit: int) -> None:
    """Set one bit of every lane's start, given what each lane's end would be from a start with that bit clear."""
    running = np.bitwise_xor.accumulate(ends)
    starts[0] |= low & (1 << bit)
    starts[1:] |= running[:-1] ^ np.uint8(low & (1 << bit))


@functools.lru_cache(maxsize=8)
def _weights(lanes: int, steps: int) -> np.ndarray:
    """`p ** (steps * (lanes - 1 - j))` for every lane j: what the lanes after it multiply it by."""
    powers = np.full(lanes, pow(PRIME, steps, 1 << 64), np.uint64)
    powers[0] = 1
    return np.multiply.accumulate(powers)[::-1].copy()
