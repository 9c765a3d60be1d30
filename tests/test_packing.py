"""Packed codes against a packer written from the module's description, one bit at a time."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant import packing

WIDTHS = range(1, 9)
FIELDS = {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}
LENGTHS = (0, 1, 3, 7, 8, 9, 15, 16, 100)


def described(codes: list[int], bits: int) -> list[int]:
    """Set single bits of a list of bytes where the module's docstring says they go."""
    n = len(codes)
    m = n - n % 8
    octets = [0] * -(-n * bits // 8)
    first, low = 0, 0
    for w in FIELDS[bits]:
        size = m * w // 8
        for p in range(8 // w):
            for j in range(size):
                field = codes[p * size + j] >> low & (1 << w) - 1
                octets[first + j] |= field << w * p
        first, low = first + size, low + w
    stream = [code >> b & 1 for code in codes[m:] for b in range(bits)]
    for i, bit in enumerate(stream):
        octets[first + i // 8] |= bit << i % 8
    return octets


def there_and_back(codes):
    """Pack and unpack every entry, in one program: compiling many small ones would be most of the time."""
    packed = {(bits, lead, n): packing.pack(x, bits=bits) for (bits, lead, n), x in codes.items()}
    return packed, {key: packing.unpack(x, bits=key[0], length=key[2]) for key, x in packed.items()}


SHAPES = [(bits, (), n) for bits in WIDTHS for n in LENGTHS]
SHAPES += [(bits, lead, n) for bits, n in ((3, 13), (4, 16), (7, 0)) for lead in [(0,), (1,), (2, 0, 3), (2, 3)]]
compiled = jax.jit(there_and_back)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(0, 256), (0, 1), (255, 256), (-(2**31), 2**31), (-3, 3)]))
def test_bytes_are_those_of_the_description_and_come_back(seed, span):
    """Of integers of any size: bits above the width are dropped."""
    rng = np.random.default_rng(seed)
    codes = {key: rng.integers(*span, (*key[1], key[2])).astype(np.int32) for key in SHAPES}
    packed, unpacked = compiled(codes)
    for (bits, lead, n), x in codes.items():
        kept = x % 2**bits
        got = packed[bits, lead, n]
        assert got.dtype == unpacked[bits, lead, n].dtype == jnp.uint8
        assert got.shape == (*lead, -(-n * bits // 8)) == (*lead, packing.packed_size(n, bits=bits))
        np.testing.assert_array_equal(unpacked[bits, lead, n], kept)
        rows = np.asarray(got).reshape(-1, got.shape[-1]) if x.size else np.empty((0, 0))
        for row, expected in zip(rows, kept.reshape(-1, n) if n else kept, strict=False):
            assert row.tolist() == described(expected.tolist(), bits)


def test_the_description_tells_codes_apart():
    codes = np.arange(100) % 8
    for i in range(100):
        other = codes.copy()
        other[i] ^= 1
        assert described(codes.tolist(), 3) != described(other.tolist(), 3)


def test_traced_once_for_a_shape():
    traces = []
    pack = jax.jit(lambda codes: traces.append(codes) or packing.pack(codes, bits=5))
    assert not np.array_equal(pack(jnp.zeros(8, jnp.uint8)), pack(jnp.ones(8, jnp.uint8)))
    assert len(traces) == 1


@pytest.fixture
def without_type_checker():
    """The package's own messages, as users meet them: the type checker of the test run stands in front of them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("without_type_checker")
@pytest.mark.parametrize("bits", [0, 9, -1, "4", None])
def test_wrong_widths_are_named(bits):
    message = f"bits must be an integer from 1 to 8, got {bits!r}"
    for call in (
        lambda: packing.pack(jnp.zeros(8, jnp.uint8), bits=bits),
        lambda: packing.unpack(jnp.zeros(8, jnp.uint8), bits=bits, length=8),
        lambda: packing.packed_size(8, bits=bits),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.usefixtures("without_type_checker")
def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match="codes must be integers, got float32"):
        packing.pack(jnp.zeros(8), bits=4)
    with pytest.raises(ValueError, match="packed has 5 bytes a vector; 8 codes of 4 bits take 4"):
        packing.unpack(jnp.zeros((2, 5), jnp.uint8), bits=4, length=8)
    with pytest.raises(ValueError, match="length must not be negative, got -1"):
        packing.unpack(jnp.zeros((2, 0), jnp.uint8), bits=4, length=-1)
