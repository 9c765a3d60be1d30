"""QJL: keys as the signs of random projections and a norm, from which inner products are estimated without bias.

References:
    A. Zandieh, M. Daliri, I. Han, "QJL: 1-bit quantized JL transform for KV cache quantization with zero overhead",
    arXiv:2406.03482, definition 3.1, lemmas 3.2 and 3.5.

Differs from the paper: rows of the sketch are orthogonal, in blocks of dim, unless `rows="gaussian"` (the paper
orthogonalizes too, in its code); channels with outliers are not sketched apart; values are uniform integers with one
range a token instead of one for every 32 coordinates.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxquant import packing, quantizers, rotations
from jaxquant._pytree import pytree, static
from jaxquant.methods import uniform


@pytree
class Signs:
    """Signs of projections, and the norm: x ~ kappa |x| S^T sign(S x).

    Attributes:
        sketch: rows to project on.
        kappa: makes the estimate unbiased.
        scale_dtype: of the norm.
    """

    sketch: Float[Array, "signs dim"]
    kappa: Float[Array, ""]
    scale_dtype: quantizers.ScaleDtype = static(default="float16")

    @property
    def dim(self) -> int:
        """Length of the vectors."""
        return self.sketch.shape[-1]

    def quantize(self, x: Float[Array, "*batch dim"], /) -> quantizers.Quantized:
        """Code vectors."""
        norm, direction = quantizers.split_norm(jnp.nan_to_num(x.astype(jnp.float32)))
        positive = jnp.matmul(direction, self.sketch.mT, precision="highest") > 0
        return quantizers.Quantized(
            codes=packing.pack(positive.astype(jnp.uint8), bits=1), scales=quantizers.rounded(norm, self.scale_dtype)
        )

    def expand(self, code: quantizers.Quantized, /) -> Float[Array, "*batch signs"]:
        """Scale the signs."""
        assert code.scales is not None
        signs = packing.unpack(code.codes, bits=1, length=self.sketch.shape[0]).astype(jnp.float32) * 2 - 1
        return signs * (code.scales.astype(jnp.float32) * self.kappa)[..., None]

    def restore(self, y: Float[Array, "*batch signs"], /) -> Float[Array, "*batch dim"]:
        """Multiply by the transposed sketch."""
        return jnp.matmul(y, self.sketch, precision="highest")

    def project(self, q: Float[Array, "*batch dim"], /) -> Float[Array, "*batch signs"]:
        """Multiply by the sketch: no signs are taken of a query."""
        return jnp.matmul(q.astype(jnp.float32), self.sketch.mT, precision="highest")


def signs(key: PRNGKeyArray, *, dim: int, bits: int, rows: Literal["orthogonal", "gaussian"] = "orthogonal") -> Signs:
    """Draw a sketch of dim * bits signs.

    Args:
        key: of the sketch.
        dim: of the vectors.
        bits: a coordinate, at least 1; each is a sign.
        rows: "orthogonal" in blocks of dim, or independent "gaussian".

    Raises:
        ValueError: an argument is not one of those listed.

    Example:
        >>> quantizer = signs(jax.random.key(0), dim=64, bits=4)
        >>> k = jax.random.normal(jax.random.key(1), (64,))
        >>> estimate = quantizer.project(k) @ quantizer.expand(quantizer.quantize(k))
        >>> bool(abs(estimate / (k @ k) - 1) < 0.2)
        True
    """
    if bits < 1:
        raise ValueError(f"bits must be at least 1, got {bits}")
    count = dim * bits
    if rows == "gaussian":
        sketch = jax.random.normal(key, (count, dim), jnp.float32)
        kappa = math.sqrt(math.pi / 2) / count
    elif rows == "orthogonal":
        sketch = jnp.concatenate([rotations.haar(part, dim).matrix for part in jax.random.split(key, bits)])
        # 1 / (count E|t|), t a coordinate of a uniform point on the sphere
        kappa = math.sqrt(math.pi) * math.exp(math.lgamma((dim + 1) / 2) - math.lgamma(dim / 2)) / count
    else:
        raise ValueError(f"rows must be orthogonal or gaussian, got {rows!r}")
    return Signs(sketch=sketch, kappa=jnp.asarray(kappa, jnp.float32))


def kv(key: PRNGKeyArray, *, dim: int, bits_k: int, bits_v: int) -> tuple[Signs, uniform.Uniform]:
    """Build the pair of quantizers for a cache: sketched keys, and values as uniform integers.

    Example:
        >>> keys, values = kv(jax.random.key(0), dim=64, bits_k=3, bits_v=3)
        >>> quantizers.quantize(keys, jnp.ones(64)).nbytes
        26
    """
    return signs(key, dim=dim, bits=bits_k), uniform.asymmetric(dim=dim, bits=bits_v)


EXAMPLES = (
    lambda: signs(jax.random.key(0), dim=64, bits=4),
    lambda: signs(jax.random.key(0), dim=64, bits=4, rows="gaussian"),
)
