"""Read QATC v3: whole tensors or ranges of tokens, from memory, a path, or anything that reads ranges."""

import collections
import math
import operator
from collections.abc import Callable, Iterator
from types import TracebackType

import numpy as np
import xxhash

from jaxquant.codecs import workers
from jaxquant.codecs.errors import CorruptError
from jaxquant.codecs.limits import Limits
from jaxquant.codecs.v3 import chunks, dtypes, layout, sources


class Reader:
    """An open file: what it holds, and reads of any range of tokens.

    Only the header, the footer, the index and the chunks that a read touches are fetched. Threads may share a reader.

    Args:
        source: a buffer, a path (mapped into memory), a seekable file object, or a callable `read(offset, length)`.
        size: bytes of the file, needed for a callable only.
        limits: what the file may claim.

    Raises:
        CodecError: any of its three kinds.

    Attributes:
        tensors: name to `layout.Tensor`: dtype name, shape, token axis, bytes.
        metadata: the user's strings.
    """

    def __init__(self, source: sources.Source, *, size: int | None = None, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._source = sources.resolve(source, size)
        try:
            tensors, self.metadata, self._end = self._load()
        except BaseException:
            self._source.close()
            raise
        self.tensors = {tensor.name: tensor for tensor in tensors}

    def _load(self) -> tuple[list[layout.Tensor], dict[str, str], int]:
        size = self._source.size
        start = bytes(self._source.read(0, min(size, layout.HEADER_BYTES)))
        end = layout.parse_header(start) or size
        if not layout.HEADER_BYTES + layout.FOOTER_BYTES <= end <= size:
            raise CorruptError(f"a file of {size} bytes cannot hold {end} committed bytes")
        place = bytes(self._source.read(end - layout.FOOTER_BYTES, layout.FOOTER_BYTES))
        offset, length = layout.parse_footer(place, end, self.limits)
        tensors, metadata = layout.parse_index(bytes(self._source.read(offset, length)), place, self.limits)
        return tensors, metadata, end

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, in the order in which they were added."""
        return tuple(self.tensors)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        """Name to NumPy dtype."""
        return {name: dtypes.named(tensor.dtype) for name, tensor in self.tensors.items()}

    @property
    def end(self) -> int:
        """Bytes of the valid part of the file."""
        return self._end

    def read(
        self,
        name: str,
        start: int = 0,
        stop: int | None = None,
        *,
        at: tuple[int, ...] = (),
        out: np.ndarray | None = None,
        threads: int = 1,
    ) -> np.ndarray:
        """Read tokens `start` to `stop` of a tensor, for all or for one index of the axes before the token axis.

        Args:
            name: of the tensor.
            start: first token.
            stop: token after the last; the end of the axis if None.
            at: indices of leading axes, at most those before the token axis: `(layer,)` reads one layer.
            out: C-contiguous array to fill, of the result's shape and dtype.
            threads: chunks decoded at a time.

        Returns:
            The values, without the axes that `at` fixed: `out`, or a new array.

        Raises:
            KeyError: there is no such tensor.
            IndexError: `start`, `stop` or `at` lie outside of the tensor.
            CodecError: the bytes that were needed do not decode.

        Example:
            >>> import numpy as np
            >>> from jaxquant.codecs import v3
            >>> data = v3.encode({"keys": np.arange(48).reshape(2, 8, 3)}, axis=1)
            >>> with v3.open(data) as reader:
            ...     reader.read("keys", 6, 8, at=(1,)).tolist()
            [[42, 43, 44], [45, 46, 47]]
        """
        tensor = self.tensors[name]
        dtype = dtypes.named(tensor.dtype)
        tokens = tensor.shape[tensor.axis] if tensor.shape else 1
        stop = tokens if stop is None else stop
        if not 0 <= start <= stop <= tokens:
            raise IndexError(f"tokens {start} to {stop} lie outside of {tokens}")
        leading = tensor.shape[: tensor.axis]
        if len(at) > len(leading) or any(not 0 <= i < size for i, size in zip(at, leading, strict=False)):
            raise IndexError(f"at={at} lies outside of the axes {leading} before the token axis")
        shape = (*leading[len(at) :], stop - start, *tensor.shape[tensor.axis + 1 :]) if tensor.shape else ()
        if out is None:
            out = np.empty(shape, dtype)
        elif out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous:
            raise ValueError(f"out must be a C-contiguous {dtype}{shape}, not {out.dtype}{out.shape}")
        first = 0
        for index, size in zip(at, leading, strict=False):
            first = first * size + index
        outer = math.prod(leading[len(at) :])
        flat = out.reshape(-1).view(np.uint8)
        span = (stop - start) * tensor.row_bytes
        ranges = [
            ((first * outer + i) * tokens + start, flat[i * span : (i + 1) * span]) for i in range(outer if span else 0)
        ]
        collections.deque(workers.ordered(operator.call, self._pieces(tensor, ranges), threads), maxlen=0)
        return out

    def _pieces(self, tensor: layout.Tensor, ranges: list[tuple[int, np.ndarray]]) -> Iterator[Callable[[], object]]:
        """Yield one task for each chunk that a range of rows touches."""
        if not ranges:
            return
        ends = np.cumsum(tensor.chunks["rows"], dtype=np.int64)
        wanted: dict[int, list[tuple[int, int, np.ndarray]]] = {}
        for row, out in ranges:
            stop = row + out.size // tensor.row_bytes
            for index in range(int(np.searchsorted(ends, row, "right")), int(np.searchsorted(ends, stop)) + 1):
                begin = int(ends[index]) - int(tensor.chunks["rows"][index])
                low, high = max(row, begin), min(stop, int(ends[index]))
                part = out[(low - row) * tensor.row_bytes : (high - row) * tensor.row_bytes]
                wanted.setdefault(index, []).append((low - begin, high - begin, part))
        for index, parts in wanted.items():
            yield lambda index=index, parts=parts: self._decode(tensor, index, parts)

    def _decode(self, tensor: layout.Tensor, index: int, parts: list[tuple[int, int, np.ndarray]]) -> None:
        record = tensor.chunks[index]
        rows = int(record["rows"])
        body = np.frombuffer(self._source.read(int(record["offset"]), int(record["length"])), np.uint8)
        if xxhash.xxh3_64_intdigest(body.data) != int(record["checksum"]):
            raise CorruptError(f"the checksum of chunk {index} of tensor {tensor.name!r} differs")
        word = np.dtype(f"u{dtypes.FORMATS[tensor.dtype].word}")
        low, high, out = parts[0]
        whole = (low, high) == (0, rows) and out.ctypes.data % word.itemsize == 0
        decoded = out if whole else np.empty(rows * tensor.row_bytes, np.uint8)
        try:
            chunks.decode(body, decoded.view(word))
        except CorruptError as error:
            raise CorruptError(f"chunk {index} of tensor {tensor.name!r}: {error}") from None
        if not whole:
            for low, high, out in parts:
                out[:] = decoded[low * tensor.row_bytes : high * tensor.row_bytes]

    def verify(self) -> None:
        """Check and decode every chunk in turn, holding one at a time.

        Raises:
            CodecError: the first defect.
        """
        for tensor in self.tensors.values():
            for index, record in enumerate(tensor.chunks):
                rows = int(record["rows"])
                self._decode(tensor, index, [(0, rows, np.empty(rows * tensor.row_bytes, np.uint8))])

    def close(self) -> None:
        """Release the source; what was read stays valid."""
        self._source.close()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
