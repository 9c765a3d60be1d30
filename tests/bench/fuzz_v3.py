"""Mutate QATC v3 files and count what the decoder says: anything but a result or a CodecError is a failure.

    python tests/bench/fuzz_v3.py --mutations 300000

Half of the mutations are resealed: every checksum is made right again, so that the parsers behind it are reached.
Reported are the counts by outcome, the slowest decode and the highest memory of one decode as a share of its limit.
"""

import argparse
import collections
import struct
import time
import tracemalloc

import ml_dtypes
import numpy as np
import xxhash

from jaxquant.codecs import v3
from jaxquant.codecs.errors import CodecError
from jaxquant.codecs.limits import Limits
from jaxquant.codecs.v3 import layout

LIMIT = 1 << 20
INTERESTING = (0, 1, 2, 3, 4, 8, 15, 16, 127, 128, 254, 255)


def corpus(rng: np.random.Generator) -> list[bytes]:
    """Small files of every kind of chunk."""
    normal = rng.standard_normal((64, 32)) * np.exp(rng.standard_normal(32))
    arrays = [normal.astype(dtype) for dtype in (ml_dtypes.bfloat16, "f2", "f4", "f8", ml_dtypes.float8_e5m2)]
    arrays += [
        arrays[0][rng.integers(0, 9, 200)],
        np.cumsum(rng.integers(0, 3, (200, 8)), axis=0, dtype=np.int32),
        np.sin(np.arange(4000) * 0.01).astype(np.float32).reshape(-1, 40),
        rng.integers(0, 256, 500, dtype=np.uint8),
        np.zeros((50, 50), np.float32),
        np.zeros((0, 3), np.int8),
    ]
    files = [v3.encode(array, profile=profile) for array in arrays for profile in ("fast", "balanced", "small")]
    files.append(v3.encode({f"layer{i}/keys": arrays[i] for i in range(5)}, metadata={"a": "b"}, chunk=1024))
    return files


def _places(data: bytes) -> list[tuple[int, int, int]] | None:
    """Return where in the index each chunk record is, and the chunk's offset and length."""
    offset, length = struct.unpack("<QQ", data[-32:-16])
    index = data[offset : offset + length]
    found, at = [], 8
    pairs, tensors = struct.unpack_from("<II", index)
    for _ in range(2 * pairs):
        at += 4 + struct.unpack_from("<I", index, at)[0]
    for _ in range(tensors):
        name, dtype, ndim, _, count = struct.unpack_from("<IBBBI", index, at)
        at += 11 + name + dtype + 8 * ndim
        for _ in range(count):
            start, _, _, size = struct.unpack_from("<QQII", index, at)
            found.append((offset + at, start, size))
            at += layout.CHUNK.itemsize
    return found


def reseal(data: bytearray, places: list[tuple[int, int, int]]) -> bytes:
    """Make the checksums of chunks and index right."""
    for at, start, size in places:
        struct.pack_into("<Q", data, at + 8, xxhash.xxh3_64_intdigest(bytes(data[start : start + size])))
    offset = struct.unpack("<Q", data[-32:-24])[0]
    index = bytes(data[offset:-32])
    return bytes(data[:offset]) + index + layout.footer(index, offset)


def mutate(data: bytearray, rng: np.random.Generator) -> None:
    """Change up to four places: a bit, a byte, a number, or a copied run."""
    for _ in range(int(rng.integers(1, 5))):
        at = int(rng.integers(layout.HEADER_BYTES, len(data) - layout.FOOTER_BYTES))
        how = rng.integers(5)
        if how == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif how == 1:
            data[at] = int(rng.integers(256))
        elif how == 2:
            data[at] = INTERESTING[int(rng.integers(len(INTERESTING)))]
        elif how == 3:
            width = int(rng.choice([2, 4, 8]))
            value = int(rng.choice([0, 1, -1])) + (1 << int(rng.integers(8 * width)))
            place = min(at, len(data) - layout.FOOTER_BYTES - width)
            data[place : place + width] = (value % (1 << (8 * width))).to_bytes(width, "little")
        else:
            size = int(rng.integers(1, 16))
            source = int(rng.integers(len(data) - size))
            place = min(at, len(data) - layout.FOOTER_BYTES - size)
            data[place : place + size] = data[source : source + size]


def main() -> None:
    """Run the mutations and print the counts; exit status 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=300_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory-every", type=int, default=50, help="measure memory of every n-th decode")
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    files = corpus(rng)
    places = [_places(file) for file in files]
    limits = Limits(decoded_bytes=LIMIT, tensors=100, chunks=1000, text_bytes=10_000)
    counts, slowest, highest, failures = collections.Counter[str](), 0.0, 0, 0
    start = time.perf_counter()
    for turn in range(args.mutations):
        which = int(rng.integers(len(files)))
        data = bytearray(files[which])
        kind = rng.integers(4)
        if kind == 0:
            data = data[: int(rng.integers(len(data)))]
        else:
            mutate(data, rng)
        damaged = reseal(data, places[which] or []) if kind > 1 else bytes(data)
        measured = turn % args.memory_every == 0
        if measured:
            tracemalloc.start()
        begun = time.perf_counter()
        try:
            v3.decode(damaged, limits=limits)
            outcome = "decoded"
        except CodecError as error:
            outcome = type(error).__name__
        except Exception as error:
            outcome, failures = f"FAILED {type(error).__name__}: {error}", failures + 1
        if measured:
            highest = max(highest, tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        else:
            slowest = max(slowest, time.perf_counter() - begun)
        counts[("resealed " if kind > 1 else "") + outcome] += 1
    for outcome, count in counts.most_common():
        print(f"{count:9} {outcome}")
    spent = time.perf_counter() - start
    print(f"{args.mutations} mutations in {spent:.0f} s; slowest decode {slowest * 1e3:.1f} ms; ", end="")
    print(f"highest memory {highest / LIMIT:.2f} of the limit of {LIMIT} bytes; {failures} failures")
    raise SystemExit(failures > 0)


if __name__ == "__main__":
    main()
