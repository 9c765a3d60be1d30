"""The quantizers' arithmetic in torch: the same bytes as JAX writes, read and written where the model is.

Rotations are linear, so one matrix stands for any of them. Everything is calculated in float32, whatever autocast says.
"""

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch

from jaxquant.interop import _tables
from jaxquant.interop._tables import packed_fields, unpacked_fields
from jaxquant.interop._twins import Twin, twin
from jaxquant.quantizers import Exact, Scalar

_BLOCK = 1 << 24  # coordinates that are decoded at a time
_TINY, _EPS = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).eps


def coder(quantizer: Any) -> "Torch":
    """Give the torch twin of a quantizer.

    Raises:
        TypeError: there is none.
    """
    return twin(quantizer, scalar=ScalarCodes, exact=ExactCodes)


class Torch(Twin):
    """The operations of `_halves.Coder` that need no arithmetic, and tables that follow the model's device."""

    def __init__(self, dim: int, **tables: torch.Tensor):
        super().__init__(dim, **tables)
        self._elsewhere: dict[torch.device, Torch] = {}

    def to(self, device: torch.device) -> "Torch":
        """Give the same coder with tables on a device, one for all who ask."""
        if device not in self._elsewhere:
            self._elsewhere[device] = copy.copy(self)
            self._elsewhere[device].tables = {name: table.to(device) for name, table in self.tables.items()}
        return self._elsewhere[device]

    def join(self, parts: Sequence[torch.Tensor], /) -> torch.Tensor:
        """Concatenate along tokens."""
        return torch.cat(list(parts), dim=2)

    def zeros(self, like: torch.Tensor, tokens: int, /) -> torch.Tensor:
        """Make tokens of zeros."""
        return like.new_zeros((*like.shape[:2], tokens, like.shape[3]))

    def own(self, x: torch.Tensor, /) -> torch.Tensor:
        """Copy."""
        return x.clone(memory_format=torch.contiguous_format)

    def place(
        self,
        out: torch.Tensor,
        rows: Sequence[int],
        slots: Sequence[int],
        tokens: torch.Tensor,
        which: Sequence[int],
        /,
    ) -> torch.Tensor:
        """Copy tokens of one tensor into another, in place."""
        row, slot, source = _indices(out.device, tuple(rows), tuple(slots), tuple(which))
        out[row, :, slot] = tokens[row, :, source].to(out.dtype)
        return out


class ExactCodes(Torch):
    """`quantizers.Exact`."""

    def __init__(self, quantizer: Exact):
        super().__init__(quantizer.dim)
        self.dtype = getattr(torch, quantizer.dtype)

    def quantize(self, x: torch.Tensor, /) -> tuple[torch.Tensor, ...]:
        """Cast."""
        return (x.to(self.dtype, copy=True),)

    def dequantize(self, code: tuple[torch.Tensor, ...], like: torch.Tensor, /) -> torch.Tensor:
        """Cast back."""
        return code[0].float().nan_to_num().to(like.dtype)


class ScalarCodes(Torch):
    """`quantizers.Scalar`."""

    def __init__(self, quantizer: Scalar):
        tables = {name: torch.from_numpy(x) for name, x in _tables.tables(quantizer).items()}
        super().__init__(quantizer.dim, **tables)
        self.bits, self.rule = quantizer.bits, quantizer.scale
        self.scale_dtype = getattr(torch, quantizer.scale_dtype)

    def quantize(self, x: torch.Tensor, /) -> tuple[torch.Tensor, ...]:
        """Code vectors as `Scalar.quantize` does."""
        with torch.autocast(x.device.type, enabled=False):
            norm, direction = _polar(x.float().nan_to_num())
            y = (direction * self.dim**0.5) @ self.tables["matrix"]
            index = torch.bucketize(y, self.tables["boundaries"], out_int32=True)
            scales = norm * self._correction(y, index)
            limit = torch.finfo(self.scale_dtype).max
            return pack(_look_up(self.tables["order"], index), self.bits), scales.clamp(-limit, limit).to(
                self.scale_dtype
            )

    def dequantize(self, code: tuple[torch.Tensor, ...], like: torch.Tensor, /) -> torch.Tensor:
        """Decode vectors, a block of tokens at a time."""
        packed, scales = code
        batch, heads, tokens = scales.shape
        out = like.new_empty((batch, heads, tokens, self.dim))
        step = max(1, _BLOCK // max(1, batch * heads * self.dim))
        with torch.autocast(like.device.type, enabled=False):
            for first in range(0, tokens, step):
                block = slice(first, first + step)
                levels = _look_up(self.tables["stored"], unpack(packed[:, :, block], self.bits, self.dim).int())
                levels *= (scales[:, :, block].float() * self.dim**-0.5)[..., None]
                out[:, :, block] = levels @ self.tables["matrix"].T
        return out

    def _correction(self, y: torch.Tensor, index: torch.Tensor) -> torch.Tensor | float:
        if self.rule == "norm":
            return 1.0
        levels = _look_up(self.tables["centroids"], index)
        along = (y * levels).sum(-1)
        energy = (levels * levels).sum(-1).clamp(min=_EPS)
        if self.rule == "preserve":
            return (self.dim / energy) ** 0.5
        if self.rule == "unbiased":
            return self.dim / along.clamp(min=_EPS)
        return along / energy


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes along the last axis: `jaxquant.packing.pack`."""
    parts = packed_fields(codes, bits)
    if rest := codes.shape[-1] % 8:
        stream = (codes[..., -rest:, None] >> _arange(bits, codes)) & 1
        stream = torch.nn.functional.pad(stream.flatten(-2), (0, -rest * bits % 8))
        octets = stream.unflatten(-1, (stream.shape[-1] // 8, 8)) << _arange(8, codes)
        parts.append(octets.sum(-1, dtype=torch.uint8))
    return torch.cat(parts, dim=-1)


def unpack(packed: torch.Tensor, bits: int, length: int) -> torch.Tensor:
    """Undo `pack`."""
    codes, last = unpacked_fields(packed, bits, length, lambda parts: torch.cat(parts, dim=-1))
    if rest := length % 8:
        stream = ((last[..., None] >> _arange(8, packed)) & 1).flatten(-2)[..., : rest * bits]
        stream = stream.unflatten(-1, (rest, bits)) << _arange(bits, packed)
        codes = torch.cat([codes, stream.sum(-1, dtype=torch.uint8)], dim=-1)
    return codes


def _look_up(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return table.index_select(0, index.reshape(-1)).view(index.shape)  # a third of the time of table[index] on a CPU


@functools.lru_cache(maxsize=8)  # the same sinks at every step
def _indices(device: torch.device, *indices: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.tensor(index, device=device) for index in indices]


def _arange(count: int, like: torch.Tensor) -> torch.Tensor:
    return torch.arange(count, dtype=torch.uint8, device=like.device)


def _polar(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split finite vectors into norms, at most 2**126, and unit vectors (zero for zero)."""
    peak = x.abs().amax(-1, keepdim=True)
    large = peak > 2.0**64
    x, peak = (torch.where(large, part * 2.0**-64, part) for part in (x, peak))
    x = x / peak.clamp(min=_TINY)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    norm = peak * length
    norm = torch.where(large, norm.clamp(max=2.0**62) * 2.0**64, norm)
    return norm[..., 0], x / length.clamp(min=1.0)
