"""Files that appear whole or not at all, whatever happens to the process that writes them."""

import contextlib
import os
import pathlib
import secrets
from collections.abc import Iterator
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` when the block ends without an error.

    The content and the directory are synchronised before this returns. Where the system can write to a file without a
    name (Linux), nothing is left behind even by a killed process; elsewhere a killed process leaves a hidden file.

    Args:
        path: Where the file shall be; a symbolic link is followed.

    Yields:
        A writeable, seekable binary file.

    Raises:
        OSError: The directory cannot be written.
    """
    target = pathlib.Path(os.path.realpath(path))
    hidden = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    descriptor = _unnamed(target.parent)
    named = descriptor is None
    if descriptor is None:
        descriptor = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(descriptor)
            if not named:
                _name(descriptor, hidden)
                named = True
        os.replace(hidden, target)
    except BaseException:
        if named:
            hidden.unlink(missing_ok=True)
        raise
    _synchronise(target.parent)


def _unnamed(directory: pathlib.Path) -> int | None:
    """Open a file without a name, or nothing where that is not possible."""
    if not hasattr(os, "O_TMPFILE") or not os.path.isdir("/proc/self/fd"):
        return None
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o666)
    except OSError as error:
        if isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError):
            raise
        return None


def _name(descriptor: int, path: pathlib.Path) -> None:
    """Give an unnamed file a name. Python follows the link in /proc only if a directory is passed as well."""
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.link(f"/proc/self/fd/{descriptor}", path, src_dir_fd=directory, follow_symlinks=True)
    finally:
        os.close(directory)


def _synchronise(directory: pathlib.Path) -> None:
    """Make a rename last; systems that cannot open directories need no such thing."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
