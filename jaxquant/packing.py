"""Codes of 1 to 8 bits packed into bytes along the last axis, without a wasted bit.

Layout of one vector of `n` codes. Widths 3, 5, 6 and 7 are split into fields of 1, 2, 4 bits (3 = 2 + 1, 5 = 4 + 1,
6 = 4 + 2, 7 = 4 + 2 + 1, low bits first), and each field is packed as planes: of the first `m = n - n % 8` codes,
a field of width w fills `m w / 8` bytes, and bits `w p ... w p + w - 1` of byte `j` belong to code `p (m w / 8) + j`.
Neighbouring bytes hold neighbouring codes, so packing and unpacking are shifts of contiguous slices, and no field
crosses a byte. The last `n % 8` codes follow as a little-endian bit stream. In all, `ceil(n bits / 8)` bytes.
"""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Integer, UInt8

_FIELDS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def packed_size(length: int, *, bits: int) -> int:
    """Give the number of bytes that `length` codes of `bits` bits take.

    Example:
        >>> packed_size(128, bits=3)
        48
    """
    _fields(bits)
    if length < 0:
        raise ValueError(f"length must not be negative, got {length}")
    return -(-length * bits // 8)


@functools.partial(jax.jit, static_argnames="bits")
def pack(codes: Integer[Array, "*batch n"], *, bits: int) -> UInt8[Array, "*batch n_bytes"]:
    """Pack codes of `bits` bits (1 to 8) along the last axis.

    Args:
        codes: integers in [0, 2**bits); bits above the width are dropped.
        bits: width of a code, in bits.

    Returns:
        `ceil(n * bits / 8)` bytes a vector.

    Raises:
        ValueError: `bits` is not in 1..8.
        TypeError: `codes` are not integers.

    Example:
        >>> pack(jnp.arange(8), bits=4)
        Array([ 64,  81,  98, 115], dtype=uint8)
    """
    fields = _fields(bits)
    if not jnp.issubdtype(codes.dtype, jnp.integer):
        raise TypeError(f"codes must be integers, got {codes.dtype}")
    codes = codes.astype(jnp.uint8)
    whole = codes.shape[-1] // 8 * 8
    parts, shift = [], 0
    for width in fields:
        plane = whole * width // 8
        pieces = [
            ((codes[..., p * plane : (p + 1) * plane] >> np.uint8(shift)) & np.uint8(2**width - 1))
            << np.uint8(width * p)
            for p in range(8 // width)
        ]
        parts.append(functools.reduce(operator.or_, pieces))
        shift += width
    if codes.shape[-1] > whole:
        parts.append(_pack_stream(codes[..., whole:], bits))
    return jnp.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]


@functools.partial(jax.jit, static_argnames=("bits", "length"))
def unpack(packed: UInt8[Array, "*batch n_bytes"], *, bits: int, length: int) -> UInt8[Array, "*batch {length}"]:
    """Undo `pack`.

    Args:
        packed: the bytes `pack` returned.
        bits: width of a code, in bits.
        length: number of codes a vector.

    Raises:
        ValueError: `bits` is not in 1..8, or the last axis does not hold `length` codes.

    Example:
        >>> unpack(pack(jnp.arange(5), bits=3), bits=3, length=5)
        Array([0, 1, 2, 3, 4], dtype=uint8)
    """
    fields = _fields(bits)
    if packed.shape[-1] != packed_size(length, bits=bits):
        raise ValueError(
            f"packed has {packed.shape[-1]} bytes a vector; {length} codes of {bits} bits take "
            f"{packed_size(length, bits=bits)}"
        )
    whole = length // 8 * 8
    codes, start, shift = None, 0, 0
    for width in fields:
        plane = whole * width // 8
        part = packed[..., start : start + plane]
        mask = np.uint8(2**width - 1)
        field = jnp.concatenate([(part >> np.uint8(width * p)) & mask for p in range(8 // width)], axis=-1)
        codes = field if codes is None else codes | field << np.uint8(shift)
        start, shift = start + plane, shift + width
    assert codes is not None
    if length > whole:
        codes = jnp.concatenate([codes, _unpack_stream(packed[..., start:], bits, length - whole)], axis=-1)
    return codes


def _fields(bits: int) -> tuple[int, ...]:
    if bits not in _FIELDS:
        raise ValueError(f"bits must be an integer from 1 to 8, got {bits!r}")
    return _FIELDS[bits]


def _pack_stream(codes: UInt8[Array, "*batch few"], bits: int) -> UInt8[Array, "*batch n_bytes"]:
    """Pack fewer than eight codes as one little-endian bit stream."""
    stream = (codes[..., None] >> np.arange(bits, dtype=np.uint8)) & np.uint8(1)
    stream = stream.reshape(*codes.shape[:-1], codes.shape[-1] * bits)
    stream = jnp.pad(stream, [(0, 0)] * (codes.ndim - 1) + [(0, -stream.shape[-1] % 8)])
    octets = stream.reshape(*codes.shape[:-1], stream.shape[-1] // 8, 8) << np.arange(8, dtype=np.uint8)
    return octets.sum(axis=-1, dtype=jnp.uint8)


def _unpack_stream(packed: UInt8[Array, "*batch n_bytes"], bits: int, length: int) -> UInt8[Array, "*batch few"]:
    stream = (packed[..., None] >> np.arange(8, dtype=np.uint8)) & np.uint8(1)
    stream = stream.reshape(*packed.shape[:-1], packed.shape[-1] * 8)[..., : length * bits]
    stream = stream.reshape(*packed.shape[:-1], length, bits)
    return (stream << np.arange(bits, dtype=np.uint8)).sum(axis=-1, dtype=jnp.uint8)
