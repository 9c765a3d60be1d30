"""Encode, decode and inspect QATC v2 containers and bare QATQ payloads held in memory."""

import functools
import io
from collections.abc import Iterator

import numpy as np

from jaxquant.codecs import workers
from jaxquant.codecs.limits import Limits
from jaxquant.codecs.summary import Chunk, Summary
from jaxquant.codecs.v2 import compact, container, fnv, parity, payload
from jaxquant.codecs.v2.strategies import STRATEGIES

CHUNK = 1 << 20


def inspect(data: memoryview, limits: Limits) -> Summary:
    """Check the structure of a file and describe it, without decoding values or verifying checksums."""
    if bytes(data[:4]) != container.MAGIC:
        limits.check("encoded_bytes", len(data), "payload")
        head = payload.parse(data, limits)
        return _summary("QATQ v1", head.dtype, head.values, data, [_chunk(head, 0, len(data))])
    whole = container.parse(data, limits)
    chunks = [
        _chunk(whole.chunk(index, limits), whole.starts[index], whole.sizes[index])
        for index in range(len(whole.starts))
    ]
    return _summary("QATC v2", whole.dtype, whole.values, data, chunks)


def _summary(name: str, dtype: str, values: int, data: memoryview, chunks: list[Chunk]) -> Summary:
    return Summary(
        format=name,
        dtype=dtype,
        values=values,
        raw_nbytes=values * payload.WIDTHS[dtype],
        nbytes=len(data),
        chunks=tuple(chunks),
    )


def _chunk(head: payload.Payload, offset: int, nbytes: int) -> Chunk:
    return Chunk(
        offset=offset,
        nbytes=nbytes,
        values=head.values,
        mode=payload.MODES[head.mode],
        strategy="" if head.strategy is None else STRATEGIES[head.strategy].label,
    )


def decode(data: memoryview, limits: Limits, threads: int, out: np.ndarray | None = None) -> np.ndarray:
    """Decode a container or a bare payload; arguments as in `qatc.decode`."""
    if bytes(data[:4]) == container.MAGIC:
        whole = container.parse(data, limits)
        words = _words(whole.dtype, whole.values, out)
        container.fill(whole, limits, words, threads)
        return payload.as_values(words, whole.dtype)
    limits.check("encoded_bytes", len(data), "payload")
    head = payload.parse(data, limits)
    words = _words(head.dtype, head.values, out)
    payload.fill(head, words)
    payload.verify(head, payload.checksum(words))
    return payload.as_values(words, head.dtype)


def pieces(data: memoryview, limits: Limits, threads: int) -> Iterator[np.ndarray]:
    """Decode a file a group of chunks at a time, to hold no more than that.

    Args:
        data: Container or bare payload.
        limits: Bounds on what it may claim.
        threads: Chunks decoded at the same time.

    Yields:
        Consecutive values.
    """
    if bytes(data[:4]) != container.MAGIC:
        yield decode(data, limits, threads)
        return
    whole = container.parse(data, limits)
    first = 0
    while first < len(whole.starts):
        last = first + 1
        while last < len(whole.starts) and whole.firsts[last + 1] - whole.firsts[first] <= 32 * CHUNK:
            last += 1
        words = payload.words_of(whole.dtype, whole.firsts[last] - whole.firsts[first])
        container.fill(whole, limits, words, threads, range(first, last))
        yield payload.as_values(words, whole.dtype)
        first = last


def _words(dtype: str, values: int, out: np.ndarray | None) -> np.ndarray:
    words = payload.words_of(dtype, 0 if out is not None else values)
    if out is None:
        return words
    wanted = payload.as_values(words, dtype).dtype
    if out.dtype != wanted or out.size != values or not out.flags.c_contiguous or not out.flags.writeable:
        raise ValueError(
            f"out: {out.dtype} of {out.size} values, but the file holds {wanted} of {values}; "
            "it must also be contiguous and writeable"
        )
    return out.reshape(-1).view(words.dtype)


def encode_payload(words: np.ndarray, dtype: str, stride: int) -> bytes:
    """Write a bare payload by the default choices; arguments as in `chunks`."""
    body = compact.choose(words, stride)
    return b"".join(
        [payload.head(4, words.size, payload.checksum(words)), payload.exact_head(body.strategy, dtype), *body.parts]
    )


def encode(words: np.ndarray, dtype: str, *, exact: bool, chunk: int, stride: int, threads: int) -> bytes:
    """Write a container; arguments as in `chunks`."""
    file = io.BytesIO()  # parts are copied as they come, so that their memory serves the next chunks
    file.write(container.head(words.size, count(words, chunk), 0))

    def parts() -> Iterator:
        for chunk_parts in chunks(words, dtype, exact=exact, chunk=chunk, stride=stride, threads=threads):
            for part in chunk_parts:
                file.write(part)
                yield part

    checksum = fnv.fnv1a_parts(parts())
    file.seek(0)
    file.write(container.head(words.size, count(words, chunk), checksum))
    return file.getvalue()


def count(words: np.ndarray, chunk: int) -> int:
    """Return the number of chunks of a container; even an empty one has one."""
    return max(-(-words.size // chunk), 1)


def chunks(
    words: np.ndarray, dtype: str, *, exact: bool, chunk: int, stride: int, threads: int
) -> Iterator[list[bytes | memoryview]]:
    """Write the chunks of a container.

    Args:
        words: From `buffers.words_of`.
        dtype: Name on the wire.
        exact: Whether to choose as QATQ does.
        chunk: Values per chunk.
        stride: Distance in elements at which to expect similar values, 0 for none; ignored for f32.
        threads: Chunks encoded at the same time.

    Yields:
        For every chunk the parts of its length, header and body.
    """
    even = words.size // chunk
    batched = even if fnv.hashes_rows_faster(words, even) else 0
    # Chunks are planned by eights: a sample each is a tenth of the time of encoding them.
    plan = functools.cache(lambda first: compact.make_plan(words[first * chunk : (first + 8) * chunk], stride))

    def one(index: int) -> tuple[compact.Body, int]:
        piece = words[index * chunk : (index + 1) * chunk]
        checksum = 0 if index < batched else payload.checksum(piece)
        if exact:
            strategy, body = parity.choose(piece, stride if piece.itemsize == 2 else 0)
            return compact.Body(strategy=strategy, parts=[body]), checksum
        return compact.choose(piece, stride, plan(index // 8 * 8) if piece.size >= CHUNK else None), checksum

    results = workers.ordered(one, range(count(words, chunk)), threads)
    known = payload.row_checksums(words[: batched * chunk].reshape(batched, chunk)) if batched else []
    for index, (body, checksum) in enumerate(results):
        values = min(chunk, words.size - index * chunk)
        yield [
            (payload.HEADER.size + payload.EXACT.size + body.nbytes).to_bytes(4, "big"),
            payload.head(4, values, known[index] if index < batched else checksum),
            payload.exact_head(body.strategy, dtype),
            *body.parts,
        ]
