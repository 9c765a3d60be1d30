"""Bytes from wherever a caller has them, without a copy where that is possible."""

import contextlib
import mmap
import os
from collections.abc import Iterator
from typing import Any

import numpy as np


@contextlib.contextmanager
def opened(source: Any) -> Iterator[memoryview]:
    """Give a view of the bytes of a source while it is needed.

    Args:
        source: Any C-contiguous buffer (bytes, memoryview, mmap, array), a path, or a binary file object. A file on
            disk is mapped into memory from its position, anything else is read to its end.

    Yields:
        Its bytes.

    Raises:
        TypeError: The source is none of these.
    """
    if isinstance(source, str | os.PathLike):
        with open(source, "rb") as file, opened(file) as view:
            yield view
    elif hasattr(source, "read") and not isinstance(source, mmap.mmap):
        with _mapped(source) as view:
            yield view
    else:
        try:
            plain = (
                np.ascontiguousarray(source).reshape(-1).view(np.uint8) if isinstance(source, np.ndarray) else source
            )
            view = memoryview(plain).cast("B")  # pyright: ignore[reportArgumentType]  # arrays are buffers
        except (TypeError, ValueError):
            raise TypeError(f"data: {type(source).__name__} is no contiguous buffer, path or binary file") from None
        yield view


@contextlib.contextmanager
def _mapped(file) -> Iterator[memoryview]:
    start = 0
    try:
        start, size = file.tell(), os.fstat(file.fileno()).st_size
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size > start else None
    except (OSError, ValueError, AttributeError):
        mapped = None
    if mapped is None:
        yield memoryview(file.read())
        return
    # The result of a decode never refers to the mapping, but an exception's traceback may: it closes with them.
    yield memoryview(mapped)[start:]
