"""The quantizers' arithmetic in MLX: the same bytes as JAX writes, read and written where the model is.

Rotations are linear, so one matrix stands for any of them. Everything is calculated in float32.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from jaxquant.interop import _tables
from jaxquant.interop._tables import packed_fields, unpacked_fields
from jaxquant.interop._twins import Twin, twin
from jaxquant.quantizers import Exact, Scalar

_TINY, _EPS = 2.0**-126, 2.0**-23
_LARGEST = {mx.float16: 65504.0, mx.bfloat16: 3.3895313892515355e38, mx.float32: 3.4028234663852886e38}


def coder(quantizer: Any) -> "Mlx":
    """Give the MLX twin of a quantizer.

    Raises:
        TypeError: there is none.
    """
    return twin(quantizer, scalar=ScalarCodes, exact=ExactCodes)


class Mlx(Twin):
    """The operations of `_halves.Coder` that need no arithmetic."""

    def join(self, parts: Sequence[mx.array], /) -> mx.array:
        """Concatenate along tokens."""
        return mx.concatenate(list(parts), axis=2)

    def zeros(self, like: mx.array, tokens: int, /) -> mx.array:
        """Make tokens of zeros."""
        return mx.zeros((*like.shape[:2], tokens, like.shape[3]), like.dtype)

    def own(self, x: mx.array, /) -> mx.array:
        """Copy what is a part of something larger."""
        return mx.contiguous(x)

    def place(
        self, out: mx.array, rows: Sequence[int], slots: Sequence[int], tokens: mx.array, which: Sequence[int], /
    ):
        """Copy tokens of one array into another."""
        row, slot, source = (mx.array(list(part)) for part in (rows, slots, which))
        out[row, :, slot] = tokens[row, :, source].astype(out.dtype)
        return out


class ExactCodes(Mlx):
    """`quantizers.Exact`."""

    def __init__(self, quantizer: Exact):
        super().__init__(quantizer.dim)
        self.dtype = getattr(mx, quantizer.dtype)

    def quantize(self, x: mx.array, /) -> tuple[mx.array, ...]:
        """Cast."""
        return (x.astype(self.dtype),)

    def dequantize(self, code: tuple[mx.array, ...], like: mx.array, /) -> mx.array:
        """Cast back."""
        return mx.nan_to_num(code[0].astype(mx.float32)).astype(like.dtype)


class ScalarCodes(Mlx):
    """`quantizers.Scalar`."""

    def __init__(self, quantizer: Scalar):
        super().__init__(quantizer.dim, **{name: mx.array(x) for name, x in _tables.tables(quantizer).items()})
        self.bits, self.rule = quantizer.bits, quantizer.scale
        self.scale_dtype = getattr(mx, quantizer.scale_dtype)

    def quantize(self, x: mx.array, /) -> tuple[mx.array, ...]:
        """Code vectors as `Scalar.quantize` does."""
        norm, direction = _polar(mx.nan_to_num(x.astype(mx.float32)))
        y = (direction * self.dim**0.5) @ self.tables["matrix"]
        index = mx.searchsorted(self.tables["boundaries"], y)
        limit = _LARGEST[self.scale_dtype]
        scales = mx.clip(norm * self._correction(y, index), -limit, limit).astype(self.scale_dtype)
        return pack(self.tables["order"][index], self.bits), scales

    def dequantize(self, code: tuple[mx.array, ...], like: mx.array, /) -> mx.array:
        """Decode vectors."""
        packed, scales = code
        levels = self.tables["stored"][unpack(packed, self.bits, self.dim)]
        levels = levels * (scales.astype(mx.float32) * self.dim**-0.5)[..., None]
        return (levels @ self.tables["matrix"].T).astype(like.dtype)

    def _correction(self, y: mx.array, index: mx.array) -> mx.array | float:
        if self.rule == "norm":
            return 1.0
        levels = self.tables["centroids"][index]
        along = (y * levels).sum(axis=-1)
        energy = mx.maximum((levels * levels).sum(axis=-1), _EPS)
        if self.rule == "preserve":
            return (self.dim / energy) ** 0.5
        if self.rule == "unbiased":
            return self.dim / mx.maximum(along, _EPS)
        return along / energy


def pack(codes: mx.array, bits: int) -> mx.array:
    """Pack codes along the last axis: `jaxquant.packing.pack`."""
    parts, rest = packed_fields(codes, bits), codes.shape[-1] % 8
    if rest:
        stream = (codes[..., -rest:, None] >> _arange(bits)) & 1
        stream = stream.reshape(*codes.shape[:-1], rest * bits)
        stream = mx.pad(stream, [(0, 0)] * (codes.ndim - 1) + [(0, -rest * bits % 8)])
        octets = stream.reshape(*codes.shape[:-1], -(-rest * bits // 8), 8) << _arange(8)
        parts.append(octets.sum(axis=-1).astype(mx.uint8))
    return mx.concatenate(parts, axis=-1)


def unpack(packed: mx.array, bits: int, length: int) -> mx.array:
    """Undo `pack`."""
    codes, last = unpacked_fields(packed, bits, length, lambda parts: mx.concatenate(parts, axis=-1))
    if rest := length % 8:
        lead = packed.shape[:-1]
        stream = ((last[..., None] >> _arange(8)) & 1).reshape(*lead, last.shape[-1] * 8)
        stream = stream[..., : rest * bits].reshape(*lead, rest, bits) << _arange(bits)
        codes = mx.concatenate([codes, stream.sum(axis=-1).astype(mx.uint8)], axis=-1)
    return codes


def _arange(count: int) -> mx.array:
    return mx.arange(count, dtype=mx.uint8)


def _polar(x: mx.array) -> tuple[mx.array, mx.array]:
    """Split finite vectors into norms, at most 2**126, and unit vectors (zero for zero)."""
    peak = mx.max(mx.abs(x), axis=-1, keepdims=True)
    large = peak > 2.0**64
    x, peak = (mx.where(large, part * 2.0**-64, part) for part in (x, peak))
    x = x / mx.maximum(peak, _TINY)
    length = mx.sqrt((x * x).sum(axis=-1, keepdims=True))
    norm = peak * length
    norm = mx.where(large, mx.minimum(norm, 2.0**62) * 2.0**64, norm)
    return norm[..., 0], x / mx.maximum(length, 1.0)
