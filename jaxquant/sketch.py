"""A one-bit sketch of vectors from which inner products with any query are estimated without bias.

Only the signs of random projections are kept. With an orthogonal sketch S (rows of unit length, as many as there are
coordinates) and a vector r,

    E <S q, sign(S r)> = <q, r> / (kappa |r|),   kappa = 1 / (dim E|t|),

where t is one coordinate of a uniform point on the sphere: E|t| = Gamma(dim/2) / (sqrt(pi) Gamma((dim+1)/2)).
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from jaxquant import packing, rotations
from jaxquant._pytree import pytree


@pytree
class Sketch:
    """An orthogonal sketch with as many signs as coordinates.

    References:
        A. Zandieh, M. Daliri, I. Han, "QJL: 1-bit quantized JL transform for KV cache quantization with zero overhead",
        arXiv:2406.03482, definition 3.1.

    Differs from the paper: the rows are orthogonal instead of independent Gaussians, which divides the error's variance
    by 2.8 at equal size, and kappa is exact for the finite dimension instead of sqrt(pi / 2) / dim.
    """

    projection: rotations.Dense

    @property
    def dim(self) -> int:
        """Length of the vectors, and the number of signs."""
        return self.projection.dim

    @property
    def kappa(self) -> float:
        """The factor that makes the estimate unbiased."""
        half = self.dim / 2
        return math.sqrt(math.pi) * math.exp(math.lgamma(half + 0.5) - math.lgamma(half)) / self.dim


def orthogonal(key: PRNGKeyArray, dim: int) -> Sketch:
    """Draw an orthogonal sketch, uniformly.

    Example:
        >>> import jax
        >>> orthogonal(jax.random.key(0), 64).dim
        64
    """
    return Sketch(projection=rotations.haar(key, dim))


def signs(sketch: Sketch, x: Float[Array, "*batch dim"]) -> UInt8[Array, "*batch n_bytes"]:
    """Keep the signs of the projections of `x`, packed (1 where positive)."""
    return packing.pack((sketch.projection.rotate(x) > 0).astype(jnp.uint8), bits=1)


def plus_minus(sketch: Sketch, packed: UInt8[Array, "*batch n_bytes"]) -> Float[Array, "*batch dim"]:
    """Unpack signs to -1 and +1."""
    return packing.unpack(packed, bits=1, length=sketch.dim).astype(jnp.float32) * 2 - 1


def inner_product(
    sketch: Sketch,
    query: Float[Array, "*batch dim"],
    packed: UInt8[Array, "*batch n_bytes"],
    norm: Float[Array, "*batch"],
) -> Float[Array, "*batch"]:
    """Estimate <query, x> from the signs and the Euclidean norm of x.

    Example:
        >>> import jax
        >>> s, x = orthogonal(jax.random.key(0), 64), jax.random.normal(jax.random.key(1), (64,))
        >>> estimate = inner_product(s, x, signs(s, x), jnp.linalg.norm(x))
        >>> bool(abs(estimate / (x @ x) - 1) < 0.2)
        True
    """
    projected = sketch.projection.rotate(query.astype(jnp.float32))
    return sketch.kappa * norm * jnp.sum(projected * plus_minus(sketch, packed), axis=-1)
