"""Transform coding of vectors: a linear basis, one byte of gain, and a width of its own for every run of coordinates.

`Mixed` is what calibration makes: coordinates that matter get many bits and others none. The codes are one string of
bytes a vector, the gain first, with no bit wasted; coordinates of width 0 cost neither bytes nor time. The last
coordinates may share a trellis code (`trellis`), which leaves less error at equal bytes where coordinates are normal.
"""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from jaxquant import packing, trellis
from jaxquant._pytree import pytree, static
from jaxquant.quantizers import Quantized

STEPS = 16  # gains an octave: 4.4 % apart
_MIDDLE = 128  # the byte of gain 1
_SELECTED = 2  # bits up to which levels are selected by comparisons, which fuse, instead of looked up
_LARGEST = 2.0**100  # of an element; the squares of what becomes of it must not overflow

Widths = tuple[tuple[int, int], ...]


@pytree
class Mixed:
    """Code x as x ~ mean + gain * levels @ synthesis, where levels are near y / gain and y = analysis (x - mean).

    The arrays may have leading axes that fit those of the vectors before their last two, such as kv_heads for vectors
    [batch, kv_heads, tokens, dim]. `analysis` and `synthesis` may both be None where the vectors already come in the
    coordinates of the code, and only the first `width` of them are coded.

    The gain is a byte on a logarithmic scale. It is chosen before the levels, as the weighted root mean square of y,
    and chosen again once they are known: as the factor of least weighted error, or, with `rule="preserve"`, the one
    that keeps the weighted length. With `rule="none"` there is no gain, and no byte.

    NaN counts as 0, and numbers beyond 2**100 as that.

    Attributes:
        mean: is subtracted first.
        analysis: maps centred vectors to coordinates of unit scale.
        synthesis: the vector that each coordinate stands for.
        weights: cost of a squared error in each coordinate; they sum to 1.
        levels: for each run of coordinates, the levels of each of them, in increasing order.
        widths: the runs, as (bits of a coordinate, coordinates); a multiple of 8 coordinates wastes no bit.
        dim: length of the vectors.
        rule: how the stored gain is chosen.
        code: of the coordinates after those runs, or None where there are none.
    """

    mean: Float[Array, "*heads dim"]
    analysis: Float[Array, "*heads width dim"] | None
    synthesis: Float[Array, "*heads width dim"] | None
    weights: Float[Array, "*heads width"]
    levels: tuple[Float[Array, "*heads count levels"], ...]
    widths: Widths = static()
    dim: int = static()
    rule: Literal["least_squares", "preserve", "none"] = static(default="least_squares")
    code: trellis.Code | None = None

    @property
    def width(self) -> int:
        """Coordinates that are coded."""
        return self._scalars + (0 if self.code is None else self.code.dim)

    @property
    def bytes_per_vector(self) -> int:
        """Bytes of a code."""
        coded = sum(packing.packed_size(count, bits=bits) for bits, count in self.widths)
        return coded + (0 if self.code is None else self.code.n_bytes) + (self.rule != "none")

    def coordinates(self, x: Float[Array, "*batch dim"], /) -> Float[Array, "*batch width"]:
        """Give the coordinates y that are coded."""
        x = jnp.clip(jnp.nan_to_num(x.astype(jnp.float32)), -_LARGEST, _LARGEST) - _rows(self.mean)
        return x[..., : self.width] if self.analysis is None else _product(x, self.analysis.mT)

    def quantize(self, x: Float[Array, "*batch dim"], /) -> Quantized:
        """Code vectors."""
        y = self.coordinates(x)
        if self.rule == "none":
            return Quantized(codes=self._codes(y))
        weights = _rows(self.weights)
        first = _gain_code(root_mean_square(y, weights))
        packed = self._codes(y / _gain(first)[..., None])
        levels = self._levels(packed)
        energy = jnp.maximum(jnp.sum(weights * levels * levels, axis=-1), jnp.finfo(jnp.float32).tiny)
        if self.rule == "preserve":
            best = root_mean_square(y, weights) / energy**0.5
        else:
            peak = jnp.maximum(jnp.max(jnp.abs(y), axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
            best = jnp.sum(weights * (y / peak) * levels, axis=-1) / energy * peak[..., 0]
        return Quantized(codes=jnp.concatenate([_gain_code(best)[..., None], packed], axis=-1))

    def expand(self, code: Quantized, /) -> Float[Array, "*batch coded"]:
        """Look up and scale; the last coordinate is 1, and stands for the mean."""
        start = int(self.rule != "none")
        levels = self._levels(code.codes[..., start:])
        if start:
            levels = levels * _gain(code.codes[..., 0])[..., None]
        return jnp.concatenate([levels, jnp.ones((*levels.shape[:-1], 1), jnp.float32)], axis=-1)

    def restore(self, y: Float[Array, "*batch coded"], /) -> Float[Array, "*batch dim"]:
        """Sum the vectors that the coordinates stand for."""
        levels, ones = y[..., :-1], y[..., -1:]
        if self.synthesis is None:
            x = jnp.pad(levels, [(0, 0)] * (levels.ndim - 1) + [(0, self.dim - self.width)])
        else:
            x = _product(levels, self.synthesis)
        return x + ones * _rows(self.mean)

    def project(self, q: Float[Array, "*batch dim"], /) -> Float[Array, "*batch coded"]:
        """Multiply queries with the vectors that the coordinates stand for, and with the mean."""
        q = q.astype(jnp.float32)
        y = q[..., : self.width] if self.synthesis is None else _product(q, self.synthesis.mT)
        return jnp.concatenate([y, jnp.sum(q * _rows(self.mean), axis=-1, keepdims=True)], axis=-1)

    @property
    def _scalars(self) -> int:
        return sum(count for _, count in self.widths)

    def _codes(self, y: Float[Array, "*batch width"]) -> UInt8[Array, "*batch n_bytes"]:
        """Code coordinates."""
        packed, first = [], 0
        for (bits, count), levels in zip(self.widths, self.levels, strict=True):
            boundaries = _rows((levels[..., 1:] + levels[..., :-1]) / 2, axes=2)
            beyond = y[..., first : first + count, None] > boundaries
            packed.append(packing.pack(jnp.sum(beyond, axis=-1, dtype=jnp.uint8), bits=bits))
            first += count
        if self.code is not None:
            cost = (_rows(self.weights)[..., first:] * self.width) ** 2
            packed.append(trellis.encode(self.code, y[..., first:], cost))
        return jnp.concatenate(packed, axis=-1)

    def _levels(self, packed: UInt8[Array, "*batch n_bytes"]) -> Float[Array, "*batch width"]:
        """Look codes up."""
        parts = []
        for (bits, count), levels in zip(self.widths, self.levels, strict=True):
            size = packing.packed_size(count, bits=bits)
            code, packed = packing.unpack(packed[..., :size], bits=bits, length=count), packed[..., size:]
            if bits <= _SELECTED:
                each = [_rows(levels[..., i]) for i in range(2**bits)]
                for bit in range(bits):  # halve the choice, lowest bit first
                    odd = (code >> np.uint8(bit)) & np.uint8(1) == np.uint8(1)
                    each = [jnp.where(odd, high, low) for low, high in zip(each[::2], each[1::2], strict=True)]
                parts.append(each[0])
            else:
                place = jnp.arange(levels.size // 2**bits, dtype=jnp.int32).reshape(levels.shape[:-1]) << bits
                parts.append(jnp.take(levels.reshape(-1), _rows(place) + code.astype(jnp.int32), mode="clip"))
        if self.code is not None:
            parts.append(trellis.decode(self.code, packed))
        return jnp.concatenate(parts, axis=-1)


def root_mean_square(y: Float[Array, "*batch width"], weights: Float[Array, "*heads width"]) -> Float[Array, "*batch"]:
    """Give the weighted root mean square along the last axis, without overflow or underflow on the way.

    Example:
        >>> root_mean_square(jnp.array([0.0, 4.0]), jnp.array([0.75, 0.25]))
        Array(2., dtype=float32)
    """
    peak = jnp.maximum(jnp.max(jnp.abs(y), axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    return peak[..., 0] * jnp.sum(weights * (y / peak) ** 2, axis=-1) ** 0.5


def _gain_code(gain: Float[Array, "*batch"]) -> UInt8[Array, "*batch"]:
    """Code a gain as the nearest power of 2**(1 / STEPS), from 2**-8 on."""
    exponent = STEPS * jnp.log2(jnp.maximum(gain, 2.0**-100))
    return jnp.clip(jnp.round(exponent) + _MIDDLE, 0, 255).astype(jnp.uint8)


def _gain(code: UInt8[Array, "*batch"]) -> Float[Array, "*batch"]:
    return jnp.exp2((code.astype(jnp.float32) - _MIDDLE) / STEPS)


def _rows(x: Array, *, axes: int = 1) -> Array:
    """Make room for the token axis before the last `axes` axes, where there is a heads axis."""
    return jnp.expand_dims(x, -1 - axes) if x.ndim > axes else x


def _product(x: Array, matrix: Array) -> Array:
    return jnp.matmul(x, matrix, precision="highest")
