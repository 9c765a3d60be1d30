"""Where a reader's bytes come from: a buffer, a mapped path, a file object, or a callable that reads ranges."""

import contextlib
import mmap
import os
import threading
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np

from jaxquant.codecs.errors import CorruptError

Buffer = bytes | bytearray | memoryview | mmap.mmap | np.ndarray
Ranged = Callable[[int, int], Buffer]


@runtime_checkable
class Seekable(Protocol):
    """A binary file object that can be read at any place."""

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Go to a place and return it."""
        ...

    def read(self, size: int = -1, /) -> bytes:
        """Return up to `size` bytes."""
        ...


Source = Buffer | str | os.PathLike[str] | Seekable | Ranged


def _bytes(data: Buffer) -> memoryview:
    return memoryview(data).cast("B")  # pyright: ignore[reportArgumentType]


class Bytes:
    """A buffer in memory; ranges are views of it."""

    def __init__(self, data: Buffer) -> None:
        self._view = _bytes(data)
        self.size = self._view.nbytes

    def read(self, offset: int, length: int) -> memoryview:
        """Return `length` bytes from `offset`."""
        if offset + length > self.size:
            raise CorruptError(f"the file ends at {self.size}, before {offset + length}")
        return self._view[offset : offset + length]

    def close(self) -> None:
        """Release the buffer."""
        self._view.release()


class Mapped(Bytes):
    """A file mapped into memory; pages are read when they are touched."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        with open(path, "rb") as file:
            empty = not os.fstat(file.fileno()).st_size
            self._map = None if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        super().__init__(self._map or b"")

    def close(self) -> None:
        """Unmap the file."""
        super().close()
        if self._map is not None:
            with contextlib.suppress(BufferError):  # a failed decode's traceback may still hold a view
                self._map.close()


class Ranges:
    """A callable `read(offset, length)`; a short answer is resumed where it stopped."""

    def __init__(self, read: Ranged, size: int) -> None:
        self._read, self.size = read, size

    def read(self, offset: int, length: int) -> memoryview:
        """Return `length` bytes from `offset`."""
        got = _bytes(self._read(offset, length))
        if got.nbytes == length:
            return got
        whole = bytearray(got[:length])
        while len(whole) < length:
            more = _bytes(self._read(offset + len(whole), length - len(whole)))
            if not more.nbytes:
                raise CorruptError(f"the file ends at {offset + len(whole)}, before {offset + length}")
            whole += more[: length - len(whole)]
        return memoryview(whole)

    def close(self) -> None:
        """Leave the callable to its owner."""


def from_file(file: Seekable) -> Ranges:
    """Read ranges of a seekable file object, one at a time."""
    lock = threading.Lock()

    def read(offset: int, length: int) -> bytes:
        with lock:
            file.seek(offset)
            return file.read(length)

    return Ranges(read, file.seek(0, os.SEEK_END))


def resolve(source: Source, size: int | None) -> Bytes | Ranges:
    """Return a uniform view of any source.

    Raises:
        TypeError: a callable without `size`.
    """
    if isinstance(source, str | os.PathLike):
        return Mapped(source)
    if callable(source):
        if size is None:
            raise TypeError("a callable source needs size=, the length of the file in bytes")
        return Ranges(source, size)
    if isinstance(source, bytes | bytearray | memoryview | mmap.mmap | np.ndarray):
        return Bytes(source)
    return from_file(source)
