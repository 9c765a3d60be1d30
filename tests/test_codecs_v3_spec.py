"""docs/qatc-v3.md is enough to write another reader: one that was written from it reads what the package writes."""

from pathlib import Path

import fixtures_v3
import ml_dtypes
import numpy as np
import pytest
import qatc_v3_spec_reader
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant.codecs import v3

CASES = fixtures_v3.cases()


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("name", CASES)
def test_the_frozen_files(name: str):
    values, _ = CASES[name]
    data = (fixtures_v3.DATA / f"{name}.qatc").read_bytes()
    tensors, metadata = qatc_v3_spec_reader.read(data)
    assert list(tensors) == [""]
    assert metadata == {}
    assert same(tensors[""], values)
    if values.nbytes:
        assert not same(tensors[""], np.zeros_like(values))
        damaged = bytearray(data)
        damaged[40] ^= 1
        with pytest.raises(AssertionError):
            qatc_v3_spec_reader.read(bytes(damaged))


def test_every_frozen_file_has_a_formula():
    assert {path.stem for path in fixtures_v3.DATA.glob("*.qatc")} == set(CASES)


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(["bfloat16", "float16", "float32", "float8_e5m2", "complex64", "int16", "bool"]),
    st.sampled_from(["fast", "balanced", "small"]),
    st.integers(1, 12).map(lambda n: 8 * n),
    st.sampled_from([1, 3, 16, 33, 64]),
    st.integers(0, 2**32 - 1),
)
def test_what_is_written_now(dtype: str, profile: str, rows: int, cols: int, seed: int):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((2, rows, cols)) * np.exp(rng.standard_normal(cols))
    values[rng.random(values.shape) < 0.01] *= 1e20
    with np.errstate(all="ignore"):
        array = values.astype(getattr(ml_dtypes, dtype, dtype))
    data = v3.encode({"a": array, "b/c": array[:, :1]}, profile=profile, chunk=4096, axis=1, metadata={"k": "v"})
    tensors, metadata = qatc_v3_spec_reader.read(data)
    assert metadata == {"k": "v"}
    assert same(tensors["a"], array)
    assert same(tensors["b/c"], array[:, :1])


def test_a_file_that_was_made_longer(tmp_path: Path):
    values = np.random.default_rng(0).standard_normal((300, 32)).astype(np.float32)
    with v3.Writer(tmp_path / "x", metadata={"a": "1"}) as writer:
        writer.add("x", values[:200])
    with v3.Writer(tmp_path / "x", append=True, metadata={"b": "2"}) as writer:
        writer.append("x", values[200:])
    data = (tmp_path / "x").read_bytes()
    tensors, metadata = qatc_v3_spec_reader.read(data + b"what an interrupted writer left")
    assert metadata == {"a": "1", "b": "2"}
    assert same(tensors["x"], values)
