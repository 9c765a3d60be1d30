"""Write QATC v3 as a stream: chunks as they come, the index at the end.

A path is written beside its place and moved there when it is complete, so that a reader sees the old file or the new
one. Appending never touches committed bytes: the header is told of the longer file last.
"""

import collections
import contextlib
import itertools
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import BinaryIO, Protocol, cast, runtime_checkable

import numpy as np
import xxhash

from jaxquant.codecs import choose, chunks, dtypes, layout
from jaxquant.codecs.coders import Buffer
from jaxquant.codecs.reader import Reader

CHUNK = 1 << 21  # bytes
Path = str | os.PathLike[str]


@runtime_checkable
class Sink(Protocol):
    """What a stream is written to: a file object, a socket's file, the end of a pipe."""

    def write(self, data: memoryview, /) -> int | None:
        """Take all bytes or tell how many."""
        ...

    def flush(self) -> None:
        """Pass on what is held back."""
        ...


Task = Callable[[], tuple[int, list[Buffer], int]]  # rows, stored bytes, checksum
_MIN_COLS, _MAX_COLS = 32, 8192


def _columns(shape: tuple[int, ...], words: int) -> int:
    """Return how many words make a row for the transforms: the trailing axes that make between 32 and 8192."""
    cols, per_element = words, words
    for size in reversed(shape):
        if cols * size > _MAX_COLS and cols > per_element:
            break
        cols *= size
        if cols >= _MAX_COLS:
            break
    return cols


def _fit(cols: int, words: int) -> int:
    """Widen narrow rows, halve wide ones, until they suit the transforms and still divide the words."""
    while cols < _MIN_COLS and words % (2 * cols) == 0:
        cols *= 2
    while cols > _MAX_COLS and cols % 2 == 0:
        cols //= 2
    return cols if words % cols == 0 else 1


class Writer:
    """Write named tensors to a path or a binary file object, which may be a pipe.

    Args:
        file: a path, replaced in one step when the writer closes; or an object with `write`, never sought.
        profile: "fast", "balanced" or "small".
        chunk: bytes of values per chunk: what a random access decodes at least, and what is held at a time.
        threads: chunks encoded at a time.
        metadata: strings to store with the tensors.
        append: add to the file at this path, whose tensors and metadata stay.

    Raises:
        ValueError: an unknown profile, or a chunk size or number of threads below one.
        CodecError: the file to append to is not valid.

    Example:
        >>> import io
        >>> import numpy as np
        >>> from jaxquant.codecs import v3
        >>> pipe = io.BytesIO()
        >>> with v3.Writer(pipe, metadata={"model": "tiny"}) as writer:
        ...     writer.add("layer0/keys", (np.ones((4, 2), np.float16) for _ in range(3)))
        >>> v3.open(pipe.getvalue()).shapes
        {'layer0/keys': (12, 2)}
    """

    def __init__(
        self,
        file: Path | Sink,
        *,
        profile: str = "balanced",
        chunk: int = CHUNK,
        threads: int = 1,
        metadata: dict[str, str] | None = None,
        append: bool = False,
    ) -> None:
        if profile not in choose.PROFILES:
            raise ValueError(f"profile={profile!r} is none of {', '.join(choose.PROFILES)}")
        if not 1 <= chunk <= chunks.MAX_BYTES or threads < 1:
            raise ValueError(f"chunk={chunk} must be 1 to {chunks.MAX_BYTES} and threads={threads} at least 1")
        self._profile, self._chunk, self._threads = choose.PROFILES[profile], chunk, threads
        self.metadata = dict(metadata or {})
        self._tensors: dict[str, layout.Tensor] = {}
        self._records: dict[str, list[tuple[int, int, int, int]]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._final: Path | None = None
        self._part: str | None = None
        self._kept: int | None = None
        self._at = 0
        self._sink: Sink
        self._disk: BinaryIO | None = None
        if append:
            self._disk = self._sink = self._open_to_append(file)
        elif isinstance(file, str | os.PathLike):
            self._final = file
            self._part = f"{os.fspath(file)}.{os.getpid()}-{secrets.token_hex(4)}.part"
            self._disk = self._sink = cast(BinaryIO, open(self._part, "xb"))
        else:
            self._sink = file
        if not append:
            self._write(layout.header())

    def _open_to_append(self, file: Path | Sink) -> BinaryIO:
        if not isinstance(file, str | os.PathLike):
            raise ValueError("append=True needs a path")
        with Reader(file, limits=layout.Limits(total_bytes=1 << 62)) as reader:
            self._at = self._kept = reader.end
            self._tensors = dict(reader.tensors)
            self.metadata = {**reader.metadata, **self.metadata}
        for name, tensor in self._tensors.items():
            self._records[name] = [record.item() for record in tensor.chunks]
        opened = cast(BinaryIO, open(file, "r+b"))
        try:
            self._commit(opened, self._kept)
            opened.truncate(self._kept)
            opened.seek(self._kept)
        except BaseException:
            opened.close()
            raise
        return opened

    @staticmethod
    def _commit(file: BinaryIO, length: int) -> None:
        """Tell the header how much of the file is valid, after all of it has reached the disk."""
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        file.write(layout.header(length))
        file.flush()
        os.fsync(file.fileno())

    def _write(self, data: Buffer) -> None:
        view = memoryview(data)  # pyright: ignore[reportArgumentType]
        self._at += view.nbytes
        while view.nbytes:
            written = self._sink.write(view)
            view = view[view.nbytes if written is None else written :]

    def add(
        self, name: str, values: np.ndarray | Iterable[np.ndarray], *, axis: int = 0, dtype: np.dtype | None = None
    ) -> None:
        """Add a tensor.

        Args:
            name: unique in the file; a slash is an ordinary character.
            values: the tensor, or arrays to be joined along axis 0 and taken one at a time.
            axis: of the tokens. Ranges of it can be read alone; what follows it makes the channels.
            dtype: of an iterable that may yield nothing.

        Raises:
            ValueError: the name is taken, the axis is not one of the tensor's, or arrays differ in shape or dtype.
            TypeError: the dtype cannot be stored.
        """
        if name in self._tensors:
            raise ValueError(f"tensor {name!r} exists already; append() makes it longer")
        if not isinstance(values, np.ndarray) and hasattr(values, "__array__"):
            values = np.asarray(values)
        if isinstance(values, np.ndarray):
            if not 0 <= axis < max(1, values.ndim):
                raise ValueError(f"axis={axis} is not an axis of a tensor of shape {values.shape}")
            tensor = layout.Tensor(name, dtypes.name_of(values.dtype), values.shape, axis)
            self._start(tensor)
            self._store(tensor, values)
            return
        if axis:
            raise ValueError(f"axis={axis}: an iterable grows along axis 0, which must be that of the tokens")
        arrays = iter(values)
        first = next(arrays, None if dtype is None else np.empty(0, dtype))
        if first is None:
            raise ValueError(f"no arrays for tensor {name!r}: pass dtype= if there may be none")
        self._start(layout.Tensor(name, dtypes.name_of(first.dtype), (0, *first.shape[1:]), 0))
        self._extend(name, first, arrays)

    def append(self, name: str, values: np.ndarray | Iterable[np.ndarray]) -> None:
        """Make a tensor longer along axis 0.

        Args:
            name: of a tensor whose tokens are on axis 0.
            values: array, or arrays taken one at a time, of its dtype and of its shape after axis 0.

        Raises:
            KeyError: there is no such tensor.
            ValueError: its tokens are on another axis, or shape or dtype differ.
        """
        if self._tensors[name].axis or not self._tensors[name].shape:
            raise ValueError(f"tensor {name!r} has its tokens on axis {self._tensors[name].axis}, not on axis 0")
        arrays = iter([np.asarray(values)] if hasattr(values, "__array__") else values)
        first = next(arrays, None)
        if first is not None:
            self._extend(name, cast(np.ndarray, first), cast(Iterator[np.ndarray], arrays))

    def _start(self, tensor: layout.Tensor) -> None:
        if len(tensor.shape) > layout.MAX_DIMS:
            raise ValueError(f"tensor {tensor.name!r} has {len(tensor.shape)} axes, more than {layout.MAX_DIMS}")
        if tensor.row_bytes > chunks.MAX_BYTES:
            raise ValueError(f"a row of {tensor.name!r} has {tensor.row_bytes} bytes: choose an axis further right")
        self._tensors[tensor.name] = tensor
        self._records[tensor.name] = []

    def _extend(self, name: str, first: np.ndarray, rest: Iterable[np.ndarray]) -> None:
        """Join small arrays until they fill a chunk."""
        held: list[np.ndarray] = []
        for array in itertools.chain([first], rest):
            piece = np.asarray(array)
            self._check_piece(name, piece)
            if sum(part.nbytes for part in held) >= self._chunk:
                self._flush_pieces(name, held)
                held = []
            held.append(piece)
        if held:
            self._flush_pieces(name, held)

    def _check_piece(self, name: str, piece: np.ndarray) -> None:
        tensor = self._tensors[name]
        if not piece.ndim or piece.shape[1:] != tensor.shape[1:] or dtypes.name_of(piece.dtype) != tensor.dtype:
            expected = f"{tensor.dtype}{('n', *tensor.shape[1:])}"
            raise ValueError(f"a piece of tensor {name!r} is {piece.dtype}{piece.shape}, not {expected}")

    def _flush_pieces(self, name: str, pieces: list[np.ndarray]) -> None:
        joined = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        tensor = self._tensors[name]
        grown = layout.Tensor(name, tensor.dtype, (tensor.shape[0] + len(joined), *tensor.shape[1:]), 0)
        self._tensors[name] = grown
        self._store(grown, joined)

    def _store(self, tensor: layout.Tensor, values: np.ndarray) -> None:
        """Cut rows into chunks, encode some at a time, write them in order."""
        number = dtypes.FORMATS[tensor.dtype]
        if not values.size:
            return
        little = values.astype(values.dtype.newbyteorder("<"), copy=False)
        words = np.ascontiguousarray(little).reshape(-1).view(np.uint8).view(f"<u{number.word}")
        row_words = tensor.row_bytes // number.word
        rows = max(1, self._chunk // max(1, tensor.row_bytes))
        tokens = values.shape[tensor.axis] if values.ndim else 1
        if tensor.axis and tokens > rows // 2:  # chunks that end where the tokens of one leading index end
            rows = min(rows, tokens)
        elif rows > 64:
            rows -= rows % 64
        total = words.size // row_words
        group = tokens if rows <= tokens else total  # rows that a chunk must not reach beyond
        cuts = [
            (start, min(start + rows, first + group))
            for first in range(0, total, group)
            for start in range(first, first + group, rows)
        ]
        cols = _columns(tensor.shape[tensor.axis + 1 :], number.itemsize // number.word)

        def encode(start: int, stop: int) -> Task:
            part = words[start * row_words : stop * row_words]

            def task() -> tuple[int, list[Buffer], int]:
                parts = chunks.encode(part, _fit(cols, part.size), number.exponent_bits, self._profile)
                state = xxhash.xxh3_64()
                for piece in parts:
                    state.update(memoryview(piece))  # pyright: ignore[reportArgumentType]
                return stop - start, parts, state.intdigest()

            return task

        tasks = [encode(start, stop) for start, stop in cuts]
        for count, parts, checksum in self._in_order(tasks):
            self._records[tensor.name].append((self._at, checksum, count, sum(len(part) for part in parts)))
            for part in parts:
                self._write(part)

    def _in_order(self, tasks: list[Task]) -> Iterator[tuple[int, list[Buffer], int]]:
        if self._threads == 1 or len(tasks) == 1:
            for task in tasks:
                yield task()
            return
        self._pool = self._pool or ThreadPoolExecutor(self._threads)
        pending: collections.deque[Future[tuple[int, list[Buffer], int]]] = collections.deque()
        for task in tasks:
            pending.append(self._pool.submit(task))
            if len(pending) > 2 * self._threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def close(self) -> None:
        """Write the index and make the file valid: flush, sync, and move or commit it where it is a path."""
        for name, tensor in self._tensors.items():
            records = np.array(self._records[name], layout.CHUNK)
            self._tensors[name] = layout.Tensor(name, tensor.dtype, tensor.shape, tensor.axis, records)
        index, offset = layout.index(list(self._tensors.values()), self.metadata), self._at
        self._write(index)
        self._write(layout.footer(index, offset))
        self._sink.flush()
        if self._disk is not None:
            if self._kept is not None:
                self._commit(self._disk, self._at)
            os.fsync(self._disk.fileno())
            self._disk.close()
        if self._part is not None and self._final is not None:
            os.replace(self._part, self._final)
            _sync_folder(os.path.dirname(os.path.abspath(self._final)))
        self._stop()

    def abort(self) -> None:
        """Give up: a path keeps what it held before; a stream is left without its index, which no reader accepts."""
        self._stop()
        if self._disk is not None:
            if self._kept is not None:
                self._disk.truncate(self._kept)
            self._disk.close()
        if self._part is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._part)

    def _stop(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def _sync_folder(folder: str) -> None:
    """Make a rename durable where the system lets folders be synced."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
