"""QATC v3: named tensors of any number format in one file, smaller than raw, readable by ranges of tokens.

The byte-level specification is docs/qatc-v3.md, the threat model docs/threat-model.md.
"""

import io
from collections.abc import Mapping

import numpy as np

from jaxquant.codecs.errors import CorruptError
from jaxquant.codecs.limits import Limits
from jaxquant.codecs.summary import Tensor, TensorsSummary
from jaxquant.codecs.v3 import layout
from jaxquant.codecs.v3.reader import Reader
from jaxquant.codecs.v3.sources import Source
from jaxquant.codecs.v3.writer import CHUNK, Writer

__all__ = ["CHUNK", "Reader", "Writer", "decode", "encode", "inspect", "open", "recognizes"]


def encode(
    tensors: np.ndarray | Mapping[str, np.ndarray],
    *,
    profile: str = "balanced",
    chunk: int = CHUNK,
    threads: int = 1,
    metadata: Mapping[str, str] | None = None,
    axis: int | Mapping[str, int] = 0,
) -> bytes:
    """Encode one array, or several by name.

    Args:
        tensors: an array, or name to array.
        profile: "fast" for transfer, "balanced", or "small" for archives.
        chunk: bytes of values per chunk.
        threads: chunks encoded at a time.
        metadata: strings to store with the tensors.
        axis: of the tokens, for all tensors or by name (0 where a name is missing).

    Returns:
        A whole file.

    Raises:
        ValueError: an argument is out of range.
        TypeError: a dtype cannot be stored.

    Example:
        >>> import numpy as np
        >>> tokens = np.linspace(0, 1, 4096, dtype=np.float32).reshape(128, 32)
        >>> data = encode({"stack0/keys": tokens}, metadata={"step": "7"})
        >>> bool((decode(data)["stack0/keys"] == tokens).all())
        True
    """
    named = tensors if isinstance(tensors, Mapping) else {"": tensors}
    file = io.BytesIO()
    writer = Writer(file, profile=profile, chunk=chunk, threads=threads, metadata=dict(metadata or {}))
    try:
        for name, values in named.items():
            place = axis.get(name, 0) if isinstance(axis, Mapping) else axis
            writer.add(name, np.asarray(values), axis=place)
        writer.close()
    except BaseException:
        writer.abort()
        raise
    return file.getvalue()


def decode(
    data: Source, *, limits: Limits | None = None, threads: int = 1, out: np.ndarray | None = None
) -> np.ndarray | dict[str, np.ndarray]:
    """Decode a whole file.

    Args:
        data: a buffer, a path, or a seekable file object.
        limits: what the file may claim.
        threads: chunks decoded at a time.
        out: C-contiguous array to fill, if the file holds one tensor.

    Returns:
        The array if the file was made from one without a name, or `out`; else name to array.

    Raises:
        UnsupportedError: not QATC v3, or a dtype or transform that is unknown here.
        CorruptError: the file contradicts itself or a checksum.
        LimitError: it claims more than `limits` allow; nothing was allocated for it.

    Example:
        >>> import numpy as np
        >>> decode(encode(np.arange(5, dtype=np.int8)))
        array([0, 1, 2, 3, 4], dtype=int8)
    """
    with Reader(data, limits=limits) as reader:
        if out is not None:
            if len(reader.names) != 1:
                raise CorruptError(f"out= takes one tensor, but the file holds {len(reader.names)}")
            return reader.read(reader.names[0], out=out, threads=threads)
        if reader.names == ("",):
            return reader.read("", threads=threads)
        return {name: reader.read(name, threads=threads) for name in reader.names}


def inspect(data: Source, *, limits: Limits | None = None) -> TensorsSummary:
    """Describe a file by its index alone.

    Args:
        data: as in `decode`.
        limits: as in `decode`.

    Raises:
        CodecError: as in `decode`, but for what only decoding finds.
    """
    with Reader(data, limits=limits) as reader:
        tensors = tuple(
            Tensor(name=tensor.name, dtype=tensor.dtype, shape=tensor.shape, raw_nbytes=tensor.nbytes)
            for tensor in reader.tensors.values()
        )
        return TensorsSummary(
            format="QATC v3",
            raw_nbytes=sum(tensor.raw_nbytes for tensor in tensors),
            nbytes=reader.end,
            tensors=tensors,
        )


def recognizes(data: memoryview) -> bool:
    """Tell whether a file is of this generation."""
    return len(data) > 4 and bytes(data[:5]) == layout.MAGIC + bytes([layout.VERSION])


def open(source: Source, *, size: int | None = None, limits: Limits | None = None) -> Reader:  # noqa: A001
    """Open a file to read parts of it; the same as `Reader`.

    Args:
        source: a buffer, a path (mapped into memory), a seekable file object, or a callable `read(offset, length)`.
        size: bytes of the file, needed for a callable only.
        limits: what the file may claim.

    Returns:
        A reader, which is a context manager.

    Example:
        >>> import numpy as np
        >>> data = encode(np.arange(1000, dtype=np.uint16))
        >>> fetched = lambda offset, length: data[offset : offset + length]
        >>> open(fetched, size=len(data)).read("", 10, 13)
        array([10, 11, 12], dtype=uint16)
    """
    return Reader(source, size=size, limits=limits)
