"""Uniform integers per token: the baseline that production serves, with a range or with a largest magnitude.

`asymmetric` keeps the smallest number of a vector and a step, `symmetric` the step alone. Nothing is rotated unless a
rotation is passed; with a Hadamard transform this is the scheme that serving systems found hard to beat at 4 bits.

References:
    B. Jacob, S. Kligys, B. Chen, M. Zhu, M. Tang, A. Howard, H. Adam, D. Kalenichenko, "Quantization and training of
    neural networks for efficient integer-arithmetic-only inference", arXiv:1712.05877, s. 2.1; J. Jia et al.,
    "SAW-INT4: System-aware 4-bit KV-cache quantization for real-world LLM serving", arXiv:2604.19157 (per token, after
    a block-diagonal Hadamard transform).

Differs from the paper: one range a vector (a token of one head) instead of one a tensor; the smallest number is stored
as a float, so that 0 is not always a level; numbers are coded against the stored, rounded range, which therefore costs
no further error.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from jaxquant import packing, quantizers, rotations
from jaxquant._pytree import pytree, static
from jaxquant.protocols import Rotation

_LARGEST = 2.0**100  # of an element: sums and differences stay finite


@pytree
class Steps:
    """Codes of vectors on equidistant levels.

    Attributes:
        codes: packed integers.
        scales: distance of two levels.
        zeros: the number that code 0 stands for, or None where codes are symmetric.
    """

    codes: UInt8[Array, "*batch n_bytes"]
    scales: Float[Array, "*batch"]
    zeros: Float[Array, "*batch"] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held, everything included."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


@pytree
class Uniform:
    """Equidistant levels over the range of each rotated vector.

    Attributes:
        rotation: applied first.
        clip: share of the range that the levels cover; what lies beyond is coded as the outermost level.
        bits: of a coordinate.
        symmetric: levels -n, ..., n with n = 2**(bits - 1) - 1, instead of 2**bits levels from the smallest number on.
        scale_dtype: of what is stored beside the codes.
    """

    rotation: Rotation
    clip: Float[Array, ""]
    bits: int = static()
    symmetric: bool = static(default=False)
    scale_dtype: quantizers.ScaleDtype = static(default="float16")

    @property
    def dim(self) -> int:
        """Length of the vectors."""
        return self.rotation.dim

    def quantize(self, x: Float[Array, "*batch dim"], /) -> Steps:
        """Code vectors."""
        y = self.rotation.rotate(jnp.clip(jnp.nan_to_num(x.astype(jnp.float32)), -_LARGEST, _LARGEST))
        if self.symmetric:
            step = jnp.max(jnp.abs(y), axis=-1) * self.clip / self._top
            scales, zeros = quantizers.rounded(step, self.scale_dtype), None
            low = -self._top * scales.astype(jnp.float32)
        else:
            low, high = jnp.min(y, axis=-1), jnp.max(y, axis=-1)
            margin = (high - low) * (1 - self.clip) / 2
            zeros = quantizers.rounded(low + margin, self.scale_dtype)
            low = zeros.astype(jnp.float32)
            scales = quantizers.rounded((high - margin - low) / (2**self.bits - 1), self.scale_dtype)
        step = jnp.maximum(scales.astype(jnp.float32), jnp.finfo(jnp.float32).tiny)
        highest = 2 * self._top if self.symmetric else 2**self.bits - 1
        codes = jnp.clip(jnp.round((y - low[..., None]) / step[..., None]), 0, highest)
        return Steps(codes=packing.pack(codes.astype(jnp.uint8), bits=self.bits), scales=scales, zeros=zeros)

    def expand(self, code: Steps, /) -> Float[Array, "*batch dim"]:
        """Scale the integers, and add what code 0 stands for."""
        codes = packing.unpack(code.codes, bits=self.bits, length=self.dim).astype(jnp.float32)
        scales = code.scales.astype(jnp.float32)[..., None]
        if code.zeros is None:
            return (codes - self._top) * scales
        return codes * scales + code.zeros.astype(jnp.float32)[..., None]

    def restore(self, y: Float[Array, "*batch dim"], /) -> Float[Array, "*batch dim"]:
        """Rotate back."""
        return self.rotation.unrotate(y)

    def project(self, q: Float[Array, "*batch dim"], /) -> Float[Array, "*batch dim"]:
        """Rotate."""
        return self.rotation.rotate(q.astype(jnp.float32))

    @property
    def _top(self) -> int:
        return 2 ** (self.bits - 1) - 1


def asymmetric(*, dim: int, bits: int, rotation: Rotation | None = None, clip: float = 1.0) -> Uniform:
    """Build a quantizer with 2**bits levels from the smallest to the largest number of a vector.

    Args:
        dim: of the vectors.
        bits: a coordinate, 1 to 8.
        rotation: applied first, if any.
        clip: share of the range that the levels cover.

    Raises:
        ValueError: `bits` is not in 1..8.

    Example:
        >>> quantizer = asymmetric(dim=4, bits=2)
        >>> quantizers.dequantize(quantizer, quantizers.quantize(quantizer, jnp.array([1.0, 2.0, 3.0, 4.0])))
        Array([1., 2., 3., 4.], dtype=float32)
    """
    return _build(dim, bits, rotation, clip, symmetric=False)


def symmetric(*, dim: int, bits: int, rotation: Rotation | None = None, clip: float = 1.0) -> Uniform:
    """Build a quantizer with 2**bits - 1 levels around 0, up to the largest magnitude of a vector.

    Raises:
        ValueError: `bits` is not in 2..8.

    Example:
        >>> quantizer = symmetric(dim=4, bits=3)
        >>> quantizers.dequantize(quantizer, quantizers.quantize(quantizer, jnp.array([-3.0, 0.0, 1.0, 2.0])))
        Array([-3.,  0.,  1.,  2.], dtype=float32)
    """
    return _build(dim, bits, rotation, clip, symmetric=True)


def kv(key: PRNGKeyArray, *, dim: int, bits_k: int, bits_v: int) -> tuple[Uniform, Uniform]:
    """Build the pair of quantizers for a cache, without a rotation; the key is not used.

    Example:
        >>> keys, values = kv(jax.random.key(0), dim=64, bits_k=4, bits_v=4)
        >>> quantizers.quantize(keys, jnp.ones(64)).nbytes
        36
    """
    return asymmetric(dim=dim, bits=bits_k), asymmetric(dim=dim, bits=bits_v)


def symmetric_kv(key: PRNGKeyArray, *, dim: int, bits_k: int, bits_v: int) -> tuple[Uniform, Uniform]:
    """Build the pair of symmetric quantizers for a cache; the key is not used."""
    return symmetric(dim=dim, bits=bits_k), symmetric(dim=dim, bits=bits_v)


def rotated_kv(key: PRNGKeyArray, *, dim: int, bits_k: int, bits_v: int) -> tuple[Uniform, Uniform]:
    """Build the pair of asymmetric quantizers for a cache behind Hadamard transforms."""
    turns = [rotations.hadamard(part, dim) for part in jax.random.split(key)]
    pairs = zip(turns, (bits_k, bits_v), strict=True)
    keys, values = (asymmetric(dim=dim, bits=bits, rotation=turn) for turn, bits in pairs)
    return keys, values


def _build(dim: int, bits: int, rotation: Rotation | None, clip: float, *, symmetric: bool) -> Uniform:
    if bits not in range(1 + symmetric, 9):
        raise ValueError(f"bits must be an integer from {1 + symmetric} to 8, got {bits!r}")
    turn = rotations.Identity(dim=dim) if rotation is None else rotation
    return Uniform(rotation=turn, clip=jnp.asarray(clip, jnp.float32), bits=int(bits), symmetric=symmetric)


VARIANTS = {"symmetric": symmetric_kv, "Hadamard": rotated_kv}
EXAMPLES = (
    asymmetric(dim=64, bits=4),
    symmetric(dim=64, bits=4, rotation=rotations.hadamard(jax.random.key(0), 64)),
)
