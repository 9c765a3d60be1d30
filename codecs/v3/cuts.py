"""Where a tensor is cut into chunks, and how wide the rows are that the transforms see.

A reader needs none of this: a chunk states its rows and its columns.
"""

from jaxquant.codecs.v3 import layout

_MIN_COLS, _MAX_COLS = 32, 8192


def of(tensor: layout.Tensor, chunk: int, *, rows: int) -> list[tuple[int, int]]:
    """Cut rows into runs of about `chunk` bytes, at the ends of leading indices where those are long enough.

    Args:
        tensor: what the rows belong to.
        chunk: bytes of values.
        rows: how many there are to cut, starting where a leading index starts.

    Returns:
        First row and the row after the last of every chunk.
    """
    step = max(1, chunk // max(1, tensor.row_bytes))
    tokens = tensor.shape[tensor.axis] if tensor.axis else rows
    if tensor.axis and tokens > step // 2:
        step = min(step, tokens)
    elif step > 64:
        step -= step % 64
    group = tokens if step <= tokens else rows  # rows that a chunk must not reach beyond
    return [
        (start, min(start + step, first + group))
        for first in range(0, rows, group)
        for start in range(first, first + group, step)
    ]


def columns(shape: tuple[int, ...], words: int) -> int:
    """Return how many words make a row for the transforms: the trailing axes that make between 32 and 8192.

    Args:
        shape: of one row of the tensor.
        words: of one element.
    """
    cols = words
    for size in reversed(shape):
        if cols * size > _MAX_COLS and cols > words:
            break
        cols *= size
        if cols >= _MAX_COLS:
            break
    return cols


def fit(cols: int, words: int) -> int:
    """Widen narrow rows, halve wide ones, until they suit the transforms and still divide the words."""
    while cols < _MIN_COLS and words % (2 * cols) == 0:
        cols *= 2
    while cols > _MAX_COLS and cols % 2 == 0:
        cols //= 2
    return cols if words % cols == 0 else 1
