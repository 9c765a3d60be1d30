"""Encode, decode, inspect and verify files; "-" is standard input or output."""

import contextlib
import io
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np

from jaxquant.codecs import atomic, buffers, qatc, v2, v3, workers
from jaxquant.codecs.errors import CorruptError
from jaxquant.codecs.limits import Limits
from jaxquant.codecs.v2 import arrays, compact, container, fnv, payload
from jaxquant.codecs.v3 import choose

Progress = Callable[[int, int], None]
SHORT = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "f64": "float64"}


def encode_file(
    source: str,
    target: str,
    *,
    dtype: str | None = None,
    shape: tuple[int, ...] | None = None,
    profile: str = "v2",
    chunk: int | None = None,
    stride: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Encode a `.npy` file or raw little-endian values.

    Args:
        source: Path or "-".
        target: Path or "-"; a path is replaced atomically.
        dtype: Of raw values, "f32", "f16", "bf16" or any name NumPy or ml_dtypes knows.
        shape: Of raw values, for the v3 profiles.
        profile: As in `qatc.encode`.
        chunk: As in `qatc.encode`.
        stride: As in `qatc.encode`.
        threads: As in `qatc.encode`.
        progress: Called with bytes done and bytes in all.

    Returns:
        `raw_bytes`, `bytes`, `ratio` and `profile`.

    Raises:
        ValueError: The values cannot be what the arguments say, or the profile cannot express them.
        OSError: A file cannot be read or written.
    """
    with _input(source) as view:
        values = _values(view, dtype, shape)
        report = progress or (lambda done, total: None)
        with _output(target) as file:
            if profile == "v2" and target != "-":
                written = _stream(values, file, chunk, stride, threads, report)
            elif profile in choose.PROFILES:
                count = workers.available() if threads is None else threads
                size = v3.CHUNK if chunk is None else chunk * values.itemsize
                with v3.Writer(file, profile=profile, chunk=size, threads=count) as writer:
                    writer.add("", values)
                written = writer.nbytes
            else:
                flat = values.reshape(-1) if profile == "parity" and shape is None else values
                written = file.write(qatc.encode(flat, profile=profile, chunk=chunk, stride=stride, threads=threads))
        report(values.nbytes, values.nbytes)
        ratio = written / values.nbytes if values.nbytes else None
        return {"raw_bytes": values.nbytes, "bytes": written, "ratio": ratio, "profile": profile}


def _stream(
    values: np.ndarray, file: BinaryIO, chunk: int | None, stride: int, threads: int | None, report: Progress
) -> int:
    """Write the default profile chunk by chunk, then its header: memory does not grow with the file."""
    words, dtype = arrays.words_of(values)
    whole = compact.chunk_values(words, v2.CHUNK)
    if chunk is None and words.size <= whole:
        return file.write(v2.encode_payload(words, dtype, stride))
    size = chunk or whole
    file.write(container.head(words.size, v2.count(words, size), 0))
    made = v2.chunks(words, dtype, exact=False, chunk=size, stride=stride, threads=threads or workers.available())

    def written() -> Iterator:
        for index, parts in enumerate(made):
            for part in parts:
                file.write(part)
                yield part
            report(min((index + 1) * size * words.itemsize, words.nbytes), words.nbytes)

    checksum = fnv.fnv1a_parts(written())
    end = file.tell()
    file.seek(0)
    file.write(container.head(words.size, v2.count(words, size), checksum))
    return end


def decode_file(
    source: str,
    target: str,
    *,
    limits: Limits | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Decode a file to raw little-endian values, or to `.npy` if the target's name ends so.

    Args:
        source: Path or "-".
        target: Path or "-"; a path is replaced atomically, and untouched if the source is bad.
        limits: As in `qatc.decode`.
        threads: As in `qatc.decode`.
        progress: Called with bytes done and bytes in all.

    Returns:
        `raw_bytes`, `bytes`, `dtype` and `shape`.

    Raises:
        CodecError: As in `qatc.decode`.
        ValueError: `.npy` cannot hold the dtype, or the file holds several tensors.
        OSError: A file cannot be read or written.
    """
    with _input(source) as view:
        found, shape, values = _decoded(view, limits or Limits(), threads or workers.available())
        total = found.itemsize * math.prod(shape)
        if target.endswith(".npy") and found.kind == "V":
            raise ValueError(f"target: {target!r}, but .npy cannot hold {found.name}; give the target another suffix")
        with _output(target) as file:
            if target.endswith(".npy"):
                header = {"descr": found.str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
            done = 0
            for piece in values:
                file.write(piece.reshape(-1).view(np.uint8).data)
                done += piece.nbytes
                if progress:
                    progress(done, total)
        return {"raw_bytes": total, "bytes": len(view), "dtype": found.name, "shape": list(shape)}


def _decoded(view: memoryview, limits: Limits, threads: int) -> tuple[np.dtype, tuple[int, ...], Iterator[np.ndarray]]:
    """Dtype, shape and the values in order, decoded as they are asked for where the format allows it."""
    if v3.recognizes(view):
        values = qatc.decode(view, limits=limits, threads=threads)
        if isinstance(values, dict):
            raise ValueError(f"source: holds {len(values)} tensors ({', '.join(values)}); open it with v3 to read them")
        return values.dtype, values.shape, iter([values])
    summary = v2.inspect(view, limits)
    dtype = payload.as_values(payload.words_of(summary.dtype, 0), summary.dtype).dtype
    return dtype, (summary.values,), v2.pieces(view, limits, threads)


def verify_file(
    source: str,
    *,
    limits: Limits | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Decode a file without keeping the values: every checksum and every structure is looked at.

    Args:
        source: Path or "-".
        limits: As in `qatc.decode`.
        threads: As in `qatc.decode`.
        progress: Called with bytes done and bytes in all.

    Returns:
        `raw_bytes`, `bytes` and `valid`, which is true.

    Raises:
        CodecError: The file is not valid.
        OSError: It cannot be read.
    """
    with _input(source) as view:
        limits, threads = limits or Limits(), threads or workers.available()
        if v3.recognizes(view):
            with qatc.open(view, limits=limits) as reader:
                reader.verify()
            return {"raw_bytes": qatc.inspect(view, limits=limits).raw_nbytes, "bytes": len(view), "valid": True}
        total, done = v2.inspect(view, limits).raw_nbytes, 0
        for piece in v2.pieces(view, limits, threads):
            done += piece.nbytes
            if progress:
                progress(done, total)
        if done != total:
            raise CorruptError(f"container: {done} bytes decoded, {total} announced")
        return {"raw_bytes": total, "bytes": len(view), "valid": True}


def inspect_file(source: str, *, limits: Limits | None = None) -> dict[str, Any]:
    """Describe a file: format, dtype, sizes, and every chunk with its strategy.

    Args:
        source: Path or "-".
        limits: As in `qatc.decode`.

    Returns:
        Plain values, ready for JSON.

    Raises:
        CodecError: The file's structure is not valid.
        OSError: It cannot be read.
    """
    with _input(source) as view:
        return qatc.inspect(view, limits=limits).as_dict()


def _values(view: memoryview, dtype: str | None, shape: tuple[int, ...] | None) -> np.ndarray:
    """Values of a .npy file, or raw ones."""
    if bytes(view[:6]) == b"\x93NUMPY":
        if dtype is not None or shape is not None:
            raise ValueError("dtype and shape: a .npy file says its own")
        return _npy(view)
    if dtype is None:
        raise ValueError("dtype: raw values need one, such as f32, f16 or bf16")
    kind = _dtype(SHORT.get(dtype, dtype))
    if len(view) % kind.itemsize:
        raise ValueError(f"source: {len(view)} bytes are no whole number of {kind.name} values")
    values = np.frombuffer(view, kind)
    if shape is None:
        return values
    if math.prod(shape) != values.size:
        raise ValueError(f"shape: {shape} has {math.prod(shape)} values, the source {values.size}")
    return values.reshape(shape)


def _npy(view: memoryview) -> np.ndarray:
    head = io.BytesIO(bytes(view[: 1 << 16]))
    read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(head)
    if version[0] not in read:
        raise ValueError(f"source: .npy version {version}, this reads 1 and 2")
    shape, fortran, dtype = read[version[0]](head)
    if dtype.hasobject or len(view) - head.tell() != dtype.itemsize * math.prod(shape):
        raise ValueError(f"source: a .npy file of {dtype} {shape} with {len(view) - head.tell()} bytes of values")
    values = np.frombuffer(view, dtype, offset=head.tell())
    return values.reshape(shape[::-1]).T if fortran else values.reshape(shape)


def _dtype(name: str) -> np.dtype:
    import ml_dtypes

    try:
        return np.dtype(getattr(ml_dtypes, name, name))
    except TypeError:
        raise ValueError(f"dtype: {name!r} is none that NumPy or ml_dtypes knows") from None


@contextlib.contextmanager
def _input(source: str) -> Iterator[memoryview]:
    with buffers.opened(sys.stdin.buffer if source == "-" else source) as view:
        yield view


@contextlib.contextmanager
def _output(target: str) -> Iterator[BinaryIO]:
    if target == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
    elif os.path.isdir(target):
        raise IsADirectoryError(f"target: {target!r} is a directory")
    else:
        with atomic.replacing(target) as file:
            yield file
