"""The frozen QATC v3 files in tests/data/v3: their values by formula, and how they were written.

    python tests/fixtures_v3.py NAME ...    # writes NAME.qatc and its values; the others stay as they are

Files that exist are a promise to readers of old files, so a change of the encoder is no reason to write them again.
"""

import pathlib
import sys
from unittest import mock

import ml_dtypes
import numpy as np

from jaxquant.codecs import v3
from jaxquant.codecs.v3 import choose, planes, symbols

DATA = pathlib.Path(__file__).parent / "data" / "v3"


def cases() -> dict[str, tuple[np.ndarray, str | int | symbols.Model]]:
    """Return values by name, each with the profile, or the split that no profile would choose for them."""
    rng = np.random.default_rng(20261122)
    normal = rng.standard_normal((40, 32)) * np.exp(rng.standard_normal(32))
    normal[3, 4], normal[5, 6], normal[7, 8] = np.nan, -np.inf, 0
    half = normal.astype(ml_dtypes.bfloat16)
    smooth = np.sin(np.arange(3000) * 0.01).astype(np.float32).reshape(-1, 30)
    made: dict[str, tuple[np.ndarray, str | int | symbols.Model]] = {
        "nibbles": (half, "fast"),
        "nibbles_f32": (normal.astype(np.float32), "fast"),
        "symbols_bf16": (half, "balanced"),
        "symbols_f16": (normal.astype(np.float16), "balanced"),
        "symbols_f64": (normal, "balanced"),
        "symbols_fp8": (normal.astype(ml_dtypes.float8_e4m3fn), "balanced"),
        "planes_i32": (rng.integers(0, 99, (40, 8)).astype(np.int32), "balanced"),
        "raw": (rng.integers(0, 256, 100, dtype=np.uint8), "balanced"),
        "constant": (np.full((9, 9), 7, np.int64), "balanced"),
        "repeated": (half[rng.integers(0, 5, 64)], "balanced"),
        "delta": (np.cumsum(rng.integers(0, 3, (99, 8)), axis=0).astype(np.int32) * 9, "small"),
        "smooth": (smooth, "small"),
        "empty": (np.zeros((0, 4), np.int8), "fast"),
        "scalar": (np.array(2.5), "fast"),
        "complex": ((normal + 1j).astype(np.complex64), "fast"),
        "bool": (normal > 0, "fast"),
    }
    curved = (np.arange(60)[:, None] ** 2 * 5 + rng.integers(0, 2, (60, 16))).astype(np.int32)
    largest = ((half.view(np.uint16) >> 7) & 255).max(axis=0).astype(np.int32)
    negative = (np.arange(32) % 3 == 0).astype(np.uint16) << 11
    base = (np.maximum(largest - 14, 0) << 3).astype(np.uint16) | negative
    against = np.where(np.arange(32) % 2, symbols.SIGN, np.uint16(0)).astype(np.uint16)
    made["symbols_sorted"] = half, symbols.Model(4, base, against, 8, rng.permutation(32))
    made["symbols_8"] = normal.astype(np.float16), symbols.Model(8, np.full(32, 20, np.uint16), against, 32, None)
    made["delta_twice"] = curved, planes.DELTA_TWICE
    made["xor"] = curved, planes.XOR
    made["ordered"] = smooth, planes.DELTA | planes.ORDERED
    made["ordered_twice"] = smooth, planes.DELTA_TWICE | planes.ORDERED
    return made


def write(name: str) -> None:
    """Write one file, and its values beside those of the others."""
    values, how = cases()[name]
    if isinstance(how, str):
        data = v3.encode(values, profile=how)
    else:
        with mock.patch.object(choose, "plans", return_value=[choose.Plan(0.0, how)]):
            data = v3.encode(values, profile="small")
    (DATA / f"{name}.qatc").write_bytes(data)
    expected = dict(np.load(DATA / "expected.npz"))
    expected[name] = np.frombuffer(values.tobytes(), np.uint8)
    np.savez_compressed(DATA / "expected.npz", **expected)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        write(name)
