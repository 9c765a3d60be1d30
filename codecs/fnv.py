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

import numpy as np

OFFSET = 0xCBF29CE484222325
PRIME = 0x100000001B3
MASK = (1 << 64) - 1
_LANES = 16384
_SMALL = 8192


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
    start = 0
    while (left := octets.size - start) >= _SMALL:
        steps = 128 if left >= 128 * _LANES else 32
        lanes = min(left // steps, _LANES)
        state = _lanes(octets[start : start + lanes * steps].reshape(lanes, steps), state)
        start += lanes * steps
    for octet in octets[start:].tobytes():
        state = (state ^ octet) * PRIME & MASK
    return state


def _lanes(rows: np.ndarray, state: int) -> int:
    """Hash consecutive rows of bytes, one lane each; their length is even."""
    lanes, steps = rows.shape
    columns = _columns(rows)
    starts = _low_bytes(columns, state & 255)
    hashes = starts.astype(np.uint64)
    octets = np.empty(min(8192, hashes.size), np.uint64)
    for first in range(0, hashes.size, octets.size):
        part = hashes[first : first + octets.size]
        wide = octets[: part.size]
        for column in columns:
            np.copyto(wide, column[first : first + octets.size])
            np.bitwise_xor(part, wide, out=part)
            np.multiply(part, PRIME, out=part)
    hashes -= starts * np.uint64(pow(PRIME, steps, 1 << 64))
    tail = int((hashes * _weights(lanes, steps)).sum(dtype=np.uint64))
    return (state * pow(PRIME, steps * lanes, 1 << 64) + tail) & MASK


def _columns(rows: np.ndarray) -> np.ndarray:
    """Transpose, by pairs of bytes because NumPy moves those twice as fast."""
    pairs = np.ascontiguousarray(rows.view(np.uint16).T)
    columns = np.empty(rows.shape[::-1], np.uint8)
    np.copyto(columns[0::2], pairs, casting="unsafe")
    np.right_shift(pairs, 8, out=pairs)
    np.copyto(columns[1::2], pairs, casting="unsafe")
    return columns


def _low_bytes(columns: np.ndarray, low: int) -> np.ndarray:
    """Low byte of the state at the start of every lane, bit by bit."""
    starts = np.zeros(columns.shape[1], np.uint8)
    even = np.bitwise_xor.reduce(columns[0::2], axis=0)
    odd = np.bitwise_xor.reduce(columns[1::2], axis=0)
    ends = (even ^ odd) & 1
    _correct(starts, ends, low, 0)
    # bit 1 of 3 m is m1 ^ m0, and m0 is the running parity of bit 0: over an even number of steps the start cancels
    # and a byte counts if an odd number of steps remains.
    _correct(starts, ((even ^ odd) & 2) ^ ((odd & 1) << 1), low, 1)
    for bit in range(2, 8):
        ends = starts.copy()
        for column in columns:
            np.bitwise_xor(ends, column, out=ends)
            np.multiply(ends, 0xB3, out=ends)
        _correct(starts, ends & (1 << bit), low, bit)
    return starts


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
