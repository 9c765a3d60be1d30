"""Write QATC v3 as a stream: chunks as they come, the index at the end.

A path is written beside its place and moved there when it is complete, so that a reader sees the old file or the new
one. Appending never touches committed bytes: the header is told of the longer file last.
"""

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import BinaryIO, Protocol, cast, runtime_checkable

import numpy as np
import xxhash

from jaxquant.codecs import atomic, workers
from jaxquant.codecs.limits import Limits
from jaxquant.codecs.v3 import choose, chunks, cuts, dtypes, layout
from jaxquant.codecs.v3.coders import Buffer, Lease
from jaxquant.codecs.v3.reader import Reader

CHUNK = 1 << 21  # bytes
Path = str | os.PathLike[str]


@runtime_checkable
class Sink(Protocol):
    """What a stream is written to: a file object, a socket's file, the end of a pipe."""

    def write(self, data: memoryview, /) -> int | None:
        """Take all bytes or tell how many; they may change afterwards."""
        ...

    def flush(self) -> None:
        """Pass on what is held back."""
        ...


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
        self._kept: int | None = None
        self._at = 0
        self._replacing = contextlib.ExitStack()  # of a path that is written anew
        self._sink: Sink
        self._disk: BinaryIO | None = None  # a file that is made longer
        if append:
            self._disk = self._sink = self._open_to_append(file)
        elif isinstance(file, str | os.PathLike):
            self._sink = self._replacing.enter_context(atomic.replacing(file))
        else:
            self._sink = file
        if not append:
            self._write(layout.header())

    @property
    def nbytes(self) -> int:
        """Bytes written so far; of the whole file once the writer is closed."""
        return self._at

    def _open_to_append(self, file: Path | Sink) -> BinaryIO:
        if not isinstance(file, str | os.PathLike):
            raise ValueError("append=True needs a path")
        with Reader(file, limits=Limits(decoded_bytes=1 << 62)) as reader:
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
        cols = cuts.columns(tensor.shape[tensor.axis + 1 :], number.itemsize // number.word)

        def encode(cut: tuple[int, int]) -> tuple[int, list[Buffer], int, Lease]:
            (start, stop), lease = cut, Lease()
            part = words[start * row_words : stop * row_words]
            parts = chunks.encode(part, cuts.fit(cols, part.size), number.exponent_bits, self._profile, lease)
            state = xxhash.xxh3_64()
            for piece in parts:
                state.update(memoryview(piece))  # pyright: ignore[reportArgumentType]
            return stop - start, parts, state.intdigest(), lease

        places = cuts.of(tensor, self._chunk, rows=words.size // row_words)
        for count, parts, checksum, lease in workers.ordered(encode, places, self._threads if len(places) > 1 else 1):
            self._records[tensor.name].append((self._at, checksum, count, sum(len(part) for part in parts)))
            for part in parts:
                self._write(part)
            lease.keep()

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
            self._commit(self._disk, self._at)
            self._disk.close()
        self._replacing.close()

    def abort(self) -> None:
        """Give up: a path keeps what it held before; a stream is left without its index, which no reader accepts."""
        if self._disk is not None:
            self._disk.truncate(self._kept)
            self._disk.close()
        reason = InterruptedError("the writer was told to give up")
        self._replacing.__exit__(type(reason), reason, None)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()
