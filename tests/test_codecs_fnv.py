"""FNV-1a in lanes against the definition, one byte at a time."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant.codecs.v2 import fnv


def reference(data: bytes, state: int = fnv.OFFSET) -> int:
    for octet in data:
        state = ((state ^ octet) * 0x100000001B3) % 2**64
    return state


def test_published_vectors():
    # draft-eastlake-fnv, section 8, FNV-1a 64
    assert fnv.fnv1a(b"") == 0xCBF29CE484222325
    assert fnv.fnv1a(b"foobar") == 0x85944171F73967E8
    assert fnv.fnv1a(b"foobas") != 0x85944171F73967E8


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=300), st.integers(0, 2**64 - 1))
def test_short(data, state):
    assert fnv.fnv1a(data, state) == reference(data, state)


@pytest.mark.parametrize("size", [8191, 8192, 8193, 65_536, 600_001])
@pytest.mark.parametrize("xla", [False, True])
def test_long(size, xla, monkeypatch):
    if not xla:
        monkeypatch.delitem(sys.modules, "jax", raising=False)
    else:
        pytest.importorskip("jax")
        monkeypatch.setattr(fnv, "_XLA_BLOCK", 1 << 12)
    rng = np.random.default_rng(size)
    data, state = rng.bytes(size), int(rng.integers(1 << 63))
    assert fnv.fnv1a(data, state) == reference(data, state)
    damaged = bytearray(data)
    damaged[size // 2] ^= 0x80
    assert fnv.fnv1a(damaged, state) != reference(data, state)


def test_numpy_and_xla_agree_on_a_block_of_full_size(monkeypatch):
    pytest.importorskip("jax")
    data = np.random.default_rng(0).bytes((4 << 20) + 12345)
    compiled = fnv.fnv1a(data)
    monkeypatch.setattr(fnv, "_xla", lambda size: None)
    assert fnv.fnv1a(data) == compiled


def test_parts_are_hashed_as_one():
    data = np.random.default_rng(1).bytes(20_000)
    assert fnv.fnv1a_parts([data[:1], b"", data[1:15_000], data[15_000:]]) == reference(data)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("rows", [1, 9])
def test_rows(dtype, rows, monkeypatch):
    pytest.importorskip("jax")
    monkeypatch.setattr(fnv, "_XLA_BLOCK", 1 << 12)
    words = np.random.default_rng(rows).integers(0, 1 << 16, (rows, 70_001)).astype(dtype) * dtype(40503)
    swapped = dtype is np.uint32
    expected = [reference(row.byteswap().tobytes() if swapped else row.tobytes()) for row in words]
    assert fnv.fnv1a_rows(words, swapped=swapped) == expected
