"""Reversible maps between words and byte planes, the only arithmetic of QATC's exact strategies.

Plane 0 holds the most significant byte of every element, in element order; then come the next bytes.
"""

import numpy as np

_BLOCK = 1 << 18


def plane(words: np.ndarray, index: int, out: np.ndarray | None = None) -> np.ndarray:
    """Return one byte of every word, 0 being the most significant."""
    row = np.empty(words.size, np.uint8) if out is None else out
    shift = 8 * (words.itemsize - 1 - index)
    for first in range(0, words.size, _BLOCK):
        block = words[first : first + _BLOCK]
        np.copyto(row[first : first + _BLOCK], block >> shift if shift else block, casting="unsafe")
    return row


def split(words: np.ndarray) -> np.ndarray:
    """Separate words into byte planes.

    Args:
        words: Unsigned 16- or 32-bit words, one axis.

    Returns:
        Bytes, `[width, n]`.

    Example:
        >>> split(np.array([0x0102, 0x0304], np.uint16)).tolist()
        [[1, 3], [2, 4]]
    """
    planes = np.empty((words.itemsize, words.size), np.uint8)
    for index, row in enumerate(planes):
        plane(words, index, row)
    return planes


def merge(planes: list[np.ndarray], out: np.ndarray) -> None:
    """Rebuild words from byte planes, the most significant first."""
    for first in range(0, out.size, _BLOCK):
        block = out[first : first + _BLOCK]
        np.copyto(block, planes[0][first : first + _BLOCK])
        for plane in planes[1:]:
            np.multiply(block, 256, out=block)
            np.bitwise_or(block, plane[first : first + _BLOCK], out=block)


def xor_previous(words: np.ndarray, stride: int = 1) -> np.ndarray:
    """Return each word xor the word `stride` before it; the first `stride` words stay."""
    residual = words.copy()
    np.bitwise_xor(words[stride:], words[:-stride] if stride else words, out=residual[stride:])
    return residual


def undo_xor(residual: np.ndarray, stride: int = 1) -> None:
    """Restore words in place from `xor_previous`."""
    whole = residual.size // stride * stride
    rows = residual[:whole].reshape(-1, stride)
    np.bitwise_xor.accumulate(rows, axis=0, out=rows)
    if whole and whole < residual.size:
        residual[whole:] ^= rows[-1, : residual.size - whole]


def subtract_previous(words: np.ndarray) -> np.ndarray:
    """Return each word minus the word before it, modulo its range; the first stays."""
    residual = words.copy()
    np.subtract(words[1:], words[:-1], out=residual[1:])
    return residual


def undo_subtract(residual: np.ndarray) -> None:
    """Restore words in place from `subtract_previous`."""
    np.add.accumulate(residual, out=residual, dtype=residual.dtype)
