"""Per-vector quantizers, and `quantize` / `dequantize` at the jit boundary.

`Scalar` rotates a vector, codes each coordinate with a scalar codebook and keeps one scale; `Residual` adds a one-bit
sketch of what the code missed; `Exact` stores vectors as they are, so that uncompressed caches and layers run through
the same code. All satisfy `protocols.Quantizer`.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Integer, PyTree, UInt8

from jaxquant import codebooks, packing, sketch
from jaxquant._pytree import pytree, static
from jaxquant.protocols import Quantizer, Rotation
from jaxquant.scales import ScaleDtype, ScaleRule, correction, normalized, rounded, split_norm

__all__ = [
    "Exact",
    "PerLayer",
    "Quantized",
    "Quantizer",
    "Residual",
    "Scalar",
    "ScaleDtype",
    "ScaleRule",
    "correction",
    "dequantize",
    "normalized",
    "quantize",
    "rounded",
    "split_norm",
]


@pytree
class Quantized:
    """Codes of vectors. The packed bytes are the only copy of them.

    Attributes:
        codes: packed codes, `ceil(dim * bits / 8)` bytes a vector; for `Exact`, the vector or its bits.
        scales: factor of each vector's levels, or None.
        signs: packed signs of the residual's sketch, or None.
        residuals: norm of each vector's residual, or None.
    """

    codes: Array
    scales: Float[Array, "*batch"] | None = None
    signs: UInt8[Array, "*batch n_bytes"] | None = None
    residuals: Float[Array, "*batch"] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held, everything included."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


@pytree
class Exact:
    """No compression: vectors in a float dtype, read with NaN as 0 and infinities as the largest finite value.

    bfloat16 is held as its bits: a CPU has no bfloat16 scatter, and would widen the whole buffer for every token.
    """

    dim: int = static()
    dtype: Literal["float32", "bfloat16", "float16"] = static(default="bfloat16")

    def quantize(self, x: Float[Array, "*batch dim"], /) -> Quantized:
        """Cast."""
        codes = x.astype(self.dtype)
        return Quantized(codes=lax.bitcast_convert_type(codes, jnp.uint16) if self.dtype == "bfloat16" else codes)

    def expand(self, code: Quantized, /) -> Float[Array, "*batch dim"]:
        """Cast to float32."""
        codes = code.codes
        if self.dtype == "bfloat16":
            codes = lax.bitcast_convert_type(codes, jnp.bfloat16)
        return jnp.nan_to_num(codes.astype(jnp.float32))

    def restore(self, y: Float[Array, "*batch dim"], /) -> Float[Array, "*batch dim"]:
        """Return `y`."""
        return y

    def project(self, q: Float[Array, "*batch dim"], /) -> Float[Array, "*batch dim"]:
        """Cast to float32."""
        return q.astype(jnp.float32)


@pytree
class PerLayer:
    """One quantizer for each layer of a stack: the same code with other numbers.

    Attributes:
        stacked: a quantizer whose every array has the layers as its first axis.
    """

    stacked: Quantizer

    @property
    def dim(self) -> int:
        """Length of the vectors."""
        return self.stacked.dim

    def at(self, index: int | Integer[Array, "*indices"]) -> Quantizer:
        """Take the quantizer of one layer, or those of several."""
        return jax.tree.map(lambda leaf: leaf[index], self.stacked)


@pytree
class Scalar:
    """Norm, rotation and a scalar codebook: x ~ scale R^T c / sqrt(dim), c the levels near y = sqrt(dim) R x / |x|.

    The scale rule decides what the one stored number keeps right:

    ================  =======================  ==========================================================
    rule              scale                    keeps
    ================  =======================  ==========================================================
    `norm`            |x|                      the paper's form; decoded vectors come out short
    `preserve`        |x| sqrt(dim) / |c|      the length of x
    `unbiased`        |x| dim / <y, c>         <x, x_decoded> = |x|^2
    `least_squares`   |x| <y, c> / |c|^2       the least squared error
    ================  =======================  ==========================================================

    Norms are computed in float32, without overflow or underflow on the way, limited to 2**126, and stored in
    `scale_dtype`, clamped to its finite range. A zero vector decodes to zero. NaN counts as 0 and infinities as the
    largest finite value, so that one bad element cannot reach the other tokens.

    Codes are indices of levels, but for 4 bits: bit 3 is set below the middle of the codebook, and the low three bits
    count from there.
    """

    rotation: Rotation
    codebook: codebooks.Codebook
    bits: int = static()
    scale: ScaleRule = static(default="norm")
    scale_dtype: ScaleDtype = static(default="float16")

    @property
    def dim(self) -> int:
        """Length of the vectors."""
        return self.rotation.dim

    def quantize(self, x: Float[Array, "*batch dim"], /) -> Quantized:
        """Code vectors."""
        if self.codebook.centroids.shape[-1] > 2**self.bits:
            raise ValueError(
                f"codebook has {self.codebook.centroids.shape[-1]} levels; {self.bits} bits hold {2**self.bits}"
            )
        norm, y = self.coordinates(x)
        codes = codebooks.assign(self.codebook, y)
        if self.scale != "norm":
            norm = norm * correction(self.scale, y, codebooks.lookup(self.codebook, codes))
        return Quantized(
            codes=packing.pack(self._stored(codes), bits=self.bits), scales=rounded(norm, self.scale_dtype)
        )

    def coordinates(
        self, x: Float[Array, "*batch dim"], /
    ) -> tuple[Float[Array, "*batch"], Float[Array, "*batch dim"]]:
        """Split vectors into norms and rotated coordinates of unit variance."""
        return normalized(self.rotation, x)

    def levels(self, code: Quantized, /) -> Float[Array, "*batch dim"]:
        """Look up the unscaled levels c."""
        stored = packing.unpack(code.codes, bits=self.bits, length=self.dim)
        return codebooks.lookup(self.codebook, self._stored(stored, inverse=True))

    @property
    def stored_levels(self) -> Float[Array, " codes"]:
        """The levels in the order of the stored codes, one for every code there can be."""
        codes = jnp.arange(2**self.bits).astype(jnp.uint8)
        return codebooks.lookup(self.codebook, self._stored(codes, inverse=True))

    def expand(self, code: Quantized, /) -> Float[Array, "*batch dim"]:
        """Look up and scale."""
        assert code.scales is not None
        return self.levels(code) * (code.scales.astype(jnp.float32) * self.dim**-0.5)[..., None]

    def restore(self, y: Float[Array, "*batch dim"], /) -> Float[Array, "*batch dim"]:
        """Rotate back."""
        return self.rotation.unrotate(y)

    def project(self, q: Float[Array, "*batch dim"], /) -> Float[Array, "*batch dim"]:
        """Rotate."""
        return self.rotation.rotate(q.astype(jnp.float32))

    def _stored(self, codes: UInt8[Array, "*batch dim"], *, inverse: bool = False) -> UInt8[Array, "*batch dim"]:
        """Map indices of levels to stored codes: at 4 bits, a sign (8 where negative) and a magnitude."""
        if self.bits != 4:
            return codes
        upper = codes < np.uint8(8) if inverse else codes >= np.uint8(8)
        return codes ^ jnp.where(upper, np.uint8(8), np.uint8(15))


@pytree
class Residual:
    """A scalar code plus one bit a coordinate of what it missed, for unbiased inner products.

    References:
        A. Zandieh, M. Daliri, M. Hadian, V. Mirrokni, "TurboQuant: Online vector quantization with near-optimal
        distortion rate", arXiv:2504.19874, algorithm 2.

    Differs from the paper: the sketch is orthogonal (see `sketch.Sketch`).
    """

    scalar: Scalar
    sketch: sketch.Sketch

    @property
    def dim(self) -> int:
        """Length of the vectors."""
        return self.scalar.dim

    def quantize(self, x: Float[Array, "*batch dim"], /) -> Quantized:
        """Code vectors, then the signs of a sketch of the residual and its norm."""
        code = self.scalar.quantize(x)
        norm, y = self.scalar.coordinates(x)
        missed = norm[..., None] * self.dim**-0.5 * y - self.scalar.expand(code)
        return Quantized(
            codes=code.codes,
            scales=code.scales,
            signs=sketch.signs(self.sketch, missed),
            residuals=rounded(split_norm(missed)[0], self.scalar.scale_dtype),
        )

    def expand(self, code: Quantized, /) -> Float[Array, "*batch width"]:
        """Put the scaled levels and the scaled signs side by side: twice dim."""
        assert code.signs is not None
        assert code.residuals is not None
        scaled = sketch.plus_minus(self.sketch, code.signs) * code.residuals.astype(jnp.float32)[..., None]
        return jnp.concatenate([self.scalar.expand(code), self.sketch.kappa * scaled], axis=-1)

    def restore(self, y: Float[Array, "*batch width"], /) -> Float[Array, "*batch dim"]:
        """Un-sketch, add and rotate back."""
        levels, signs = jnp.split(y, 2, axis=-1)
        return self.scalar.restore(levels + self.sketch.projection.unrotate(signs))

    def project(self, q: Float[Array, "*batch dim"], /) -> Float[Array, "*batch width"]:
        """Rotate, and sketch what was rotated: the estimate needs no signs of the query."""
        rotated = self.scalar.project(q)
        return jnp.concatenate([rotated, self.sketch.projection.rotate(rotated)], axis=-1)


@jax.jit
def quantize(quantizer: Quantizer, x: Float[Array, "*batch dim"]) -> PyTree[Any]:
    """Code vectors.

    Args:
        quantizer: any `protocols.Quantizer`.
        x: vectors of length `quantizer.dim`.

    Returns:
        The packed code, with `.nbytes` for the quantizers of this module.

    Raises:
        ValueError: the last axis is not `quantizer.dim`.

    Example:
        >>> from jaxquant.methods import turboquant
        >>> quantizer = turboquant.mse(jax.random.key(0), dim=128, bits=4)
        >>> quantize(quantizer, jnp.ones((10, 128))).nbytes
        660
    """
    if x.shape[-1] != quantizer.dim:
        raise ValueError(f"x has shape {x.shape}; its last axis must be the quantizer's dim, {quantizer.dim}")
    return quantizer.quantize(x)


@jax.jit
def dequantize(quantizer: Quantizer, code: PyTree[Any]) -> Float[Array, "*batch dim"]:
    """Decode vectors, in float32.

    Example:
        >>> from jaxquant.methods import turboquant
        >>> quantizer = turboquant.mse(jax.random.key(0), dim=128, bits=8)
        >>> x = jax.random.normal(jax.random.key(1), (10, 128))
        >>> bool(jnp.abs(dequantize(quantizer, quantize(quantizer, x)) - x).max() < 0.1)
        True
    """
    return quantizer.restore(quantizer.expand(code))
