"""Speed of QATC v2 against zstd and whatever other codecs are installed, on the same bytes in the same run.

    python tests/bench/bench_qatc.py [--mib 64] [--rounds 5] [--json]

Rounds go through all codecs in turn, so that a busy machine slows all of them; ratios are medians over rounds. With one
core the process is pinned to it and CPU time is taken, with two it is wall time. "hash" is the share of the time that
the two FNV checksums of the format would take on their own.
"""

import argparse
import functools
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import ml_dtypes
import numpy as np
import zstandard

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

GOALS = {1: {"encode": 0.6, "decode": 0.5}, 2: {"encode": 1.0, "decode": 0.9}}


def data(name: str, mib: int) -> np.ndarray:
    """Return bf16 values: noise, or tokens of 1,024 channels with their own scales and means."""
    import fixtures_qatc

    values = mib << 19
    if name == "noise":
        words = fixtures_qatc.bf16(np.random.default_rng(0).standard_normal(values, np.float32))
    else:
        words = fixtures_qatc.channels(values // 1024).reshape(-1)
    return words.view(ml_dtypes.bfloat16)


def codecs(values: np.ndarray, threads: int) -> dict[str, tuple[Callable, Callable]]:
    """Return encode and decode of every codec."""
    from jaxquant.codecs import qatc

    raw = values.view(np.uint8).data
    found: dict[str, tuple[Callable, Callable]] = {
        "zstd -3": (zstandard.ZstdCompressor(level=3).compress, zstandard.ZstdDecompressor().decompress),
        "zstd -1": (zstandard.ZstdCompressor(level=1).compress, zstandard.ZstdDecompressor().decompress),
    }
    if importlib.util.find_spec("lz4"):
        import lz4.frame  # pyright: ignore[reportMissingImports]

        found["lz4"] = (lz4.frame.compress, lz4.frame.decompress)
    bound: dict[str, tuple[Callable, Callable]] = {
        name: (functools.partial(encode, raw), decode) for name, (encode, decode) in found.items()
    }
    bound["v2"] = (
        lambda: qatc.encode(values, threads=threads),
        lambda encoded: qatc.decode(encoded, threads=threads),
    )
    return bound


def hashing(values: np.ndarray, encoded: bytes, clock: Callable[[], float]) -> float:
    """Seconds to hash the values chunk by chunk and the container once, one after the other."""
    from jaxquant.codecs import v2
    from jaxquant.codecs.v2 import fnv, payload

    words = values.view(np.uint16)
    start = clock()
    whole = words.size // v2.CHUNK * v2.CHUNK
    payload.row_checksums(words[:whole].reshape(-1, v2.CHUNK))
    fnv.fnv1a(memoryview(encoded)[32:])
    return clock() - start


def measure(mib: int, rounds: int, cores: int) -> list[dict]:
    """Time every codec on every data set in this process."""
    rows, clock = [], time.process_time if cores == 1 else time.perf_counter
    for name in ("noise", "kv-like"):
        values = data(name, mib)
        contestants = codecs(values, cores)
        times: dict[str, list[tuple[float, float]]] = {codec: [] for codec in contestants}
        shares, sizes = [], {}
        for round_ in range(rounds + 1):
            for codec, (encode, decode) in contestants.items():
                start = clock()
                encoded = encode()
                middle = clock()
                decoded = decode(encoded)
                end = clock()
                if round_:
                    times[codec].append((middle - start, end - middle))
                else:
                    same = np.frombuffer(decoded, np.uint8) if isinstance(decoded, bytes) else decoded.view(np.uint8)
                    assert np.array_equal(same, values.view(np.uint8)), f"{codec} does not round-trip"
                sizes[codec] = len(encoded)
                if codec == "v2":
                    shares.append((hashing(values, encoded, clock), middle - start, end - middle))
        for codec, taken in times.items():
            base = times["zstd -3"]
            row = {"cores": cores, "data": name, "codec": codec, "ratio": sizes[codec] / values.nbytes}
            for index, verb in enumerate(("encode", "decode")):
                row[f"{verb}_gb_s"] = values.nbytes / 1e9 / statistics.median(pair[index] for pair in taken)
                row[f"{verb}_vs_zstd3"] = statistics.median(
                    other[index] / pair[index] for other, pair in zip(base, taken, strict=True)
                )
            if codec == "v2":
                row["hash_of_encode"] = statistics.median(hashed / encode for hashed, encode, _ in shares[1:])
                row["hash_of_decode"] = statistics.median(hashed / decode for hashed, _, decode in shares[1:])
                row["goals_met"] = all(row[f"{verb}_vs_zstd3"] >= goal for verb, goal in GOALS[cores].items())
            rows.append(row)
    return rows


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, choices=(1, 2), help="measure in this process instead of in one for each")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.cores:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
        rows = measure(arguments.mib, arguments.rounds, arguments.cores)
    else:
        rows = []
        for cores in (1, 2):
            command = [sys.executable, __file__, "--mib", str(arguments.mib), "--rounds", str(arguments.rounds)]
            command += ["--cores", str(cores), "--json"]
            rows += json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    if arguments.json:
        print(json.dumps(rows))
        return 0
    print("cores data     codec      ratio  enc GB/s  x zstd  dec GB/s  x zstd  hash of enc / dec")
    for row in rows:
        share = f"{row['hash_of_encode']:.0%} / {row['hash_of_decode']:.0%}" if "hash_of_encode" in row else ""
        print(
            f"{row['cores']:5} {row['data']:8} {row['codec']:8} {row['ratio']:7.4f} {row['encode_gb_s']:9.3f} "
            f"{row['encode_vs_zstd3']:7.2f} {row['decode_gb_s']:9.3f} {row['decode_vs_zstd3']:7.2f}  {share}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
