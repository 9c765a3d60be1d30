"""Mutate QATC and QATQ files at random and count what the decoder makes of them.

    python tests/bench/fuzz_qatc.py --mutations 500000

Every mutation must decode or raise a CodecError, within ten seconds, with memory below four times the limit it was
given. Anything else stops the run with exit status 1 and the seed that repeats it.
"""

import argparse
import collections
import json
import pathlib
import random
import resource
import signal
import struct
import sys
import time
import zipfile

import numpy as np

from jaxquant.codecs import qatc
from jaxquant.codecs.errors import CodecError
from jaxquant.codecs.v2 import fnv

LIMITS = qatc.Limits(values=1 << 22, decoded_bytes=1 << 24, encoded_bytes=1 << 24, chunks=1 << 10, chunk_values=1 << 22)
SECONDS = 10.0
INTERESTING = [0, 1, 2, 3, 4, 5, 7, 8, 10, 11, 27, 36, 63, 64, 127, 128, 254, 255, 256, 65535, 65536, 1 << 20, 1 << 22]
INTERESTING += [(1 << 26) - 1, 1 << 26, (1 << 26) + 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 64) - 1]


def seeds() -> list[bytes]:
    """Return artefacts of the real program and larger ones of our own."""
    with zipfile.ZipFile(pathlib.Path(__file__).parents[1] / "data/qatc/vectors.zip") as archive:
        found = [archive.read(name) for name in archive.namelist() if name.endswith((".qatq", ".qatc", ".bin"))]
    rng = np.random.default_rng(0)
    for array in (
        rng.standard_normal(3000).astype(np.float32),
        rng.standard_normal(3000).astype(np.float16),
        np.repeat(rng.standard_normal(30), 100).astype(np.float16),
        np.zeros(5000, np.float32),
    ):
        found += [qatc.encode(array, profile=profile, chunk=1000) for profile in ("v2", "parity")]
    return found


def mutate(random_: random.Random, data: bytes, pool: list[bytes]) -> bytes:
    """Change a file in one to four places, and sometimes repair its container checksum."""
    out = bytearray(data)
    for _ in range(random_.choice((1, 1, 1, 2, 4))):
        kind = random_.randrange(9)
        at = random_.randrange(len(out)) if out else 0
        if kind == 0 and out:
            out[at] ^= 1 << random_.randrange(8)
        elif kind == 1 and out:
            out[at] = random_.randrange(256)
        elif kind == 2:
            del out[at:]
        elif kind == 3:
            out[at:at] = random_.randbytes(random_.randrange(1, 9))
        elif kind == 4:
            del out[at : at + random_.randrange(1, 17)]
        elif kind == 5:
            size = random_.choice((1, 2, 3, 4, 8))
            value = random_.choice(INTERESTING) & (1 << 8 * size) - 1
            out[at : at + size] = value.to_bytes(size, random_.choice(("big", "little")))
        elif kind == 6:
            other = random_.choice(pool)
            start = random_.randrange(len(other)) if other else 0
            out[at : at + random_.randrange(1, 65)] = other[start : start + random_.randrange(1, 65)]
        elif kind == 7 and len(out) > 36:
            out[random_.choice((4, 5, 6, 15, 16, 19, 32, 33, 34))] = random_.randrange(16)
        else:
            out[at:at] = out[at : at + random_.randrange(1, 33)]
    if out[:5] == b"QATC\x03":
        out[4] = 2  # the other generation has a reader of its own
    if out[:4] == b"QATC" and len(out) >= 32 and random_.random() < 0.8:
        out[24:32] = struct.pack(">Q", fnv.fnv1a(out[32:]))
    return bytes(out)


def run(mutations: int, seconds: float, seed: int) -> dict:
    """Decode mutations until either bound is reached."""
    pool, verdicts, slowest = seeds(), collections.Counter(), 0.0
    decodable = sum(map(_valid, pool))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGALRM, _hangs)
    started, done = time.perf_counter(), 0
    while done < mutations and time.perf_counter() - started < seconds:
        random_ = random.Random(f"{seed}:{done}")
        data = mutate(random_, random_.choice(pool), pool)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        began = time.perf_counter()
        try:
            qatc.decode(data, limits=LIMITS, threads=1)
            verdicts["decoded"] += 1
        except CodecError as error:
            verdicts[type(error).__name__] += 1
        except BaseException as error:
            print(f"mutation {seed}:{done} ({len(data)} bytes): {error!r}", file=sys.stderr)
            raise
        slowest = max(slowest, time.perf_counter() - began)
        done += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    took = time.perf_counter() - started
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return {
        "seeds": len(pool),
        "decodable_seeds": decodable,
        "mutations": done,
        "seconds": round(took, 1),
        "per_second": round(done / took),
        "verdicts": dict(verdicts),
        "slowest_seconds": round(slowest, 4),
        "memory_grown_bytes": grown,
        "memory_allowed_bytes": 4 * LIMITS.decoded_bytes,
        "passed": slowest < SECONDS and grown <= 4 * LIMITS.decoded_bytes,
    }


def _valid(data: bytes) -> bool:
    try:
        qatc.decode(data, limits=LIMITS, threads=1)
    except CodecError:
        return False
    return True


def _hangs(signum, frame):
    raise TimeoutError(f"a mutation took longer than {SECONDS} s")


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=500_000)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = run(arguments.mutations, arguments.seconds, arguments.seed)
    print(json.dumps(result) if arguments.json else "\n".join(f"{key:22} {value}" for key, value in result.items()))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
