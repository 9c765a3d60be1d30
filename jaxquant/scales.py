"""The one number that is stored for a vector: its norm, the rules that correct it, and how it is rounded."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.protocols import Rotation

ScaleRule = Literal["norm", "preserve", "unbiased", "least_squares"]
ScaleDtype = Literal["float16", "bfloat16", "float32"]


def split_norm(x: Float[Array, "*batch dim"]) -> tuple[Float[Array, "*batch"], Float[Array, "*batch dim"]]:
    """Split finite vectors into norms, at most 2**126, and unit vectors (zero for zero).

    Example:
        >>> split_norm(jnp.array([3e30, 4e30]))[1]
        Array([0.6, 0.8], dtype=float32)
    """
    peak = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    large = peak > 2.0**64  # the reciprocal of a peak beyond 2**126 is subnormal, which processors flush to zero
    x, peak = (jnp.where(large, part * 2.0**-64, part) for part in (x, peak))
    x = x / jnp.maximum(peak, jnp.finfo(jnp.float32).tiny)
    length = jnp.linalg.norm(x, axis=-1, keepdims=True)
    norm = peak * length
    norm = jnp.where(large, jnp.minimum(norm, 2.0**62) * 2.0**64, norm)
    return norm[..., 0], x / jnp.maximum(length, 1.0)


def normalized(
    rotation: Rotation, x: Float[Array, "*batch dim"]
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch dim"]]:
    """Split vectors into norms and rotated coordinates of unit variance; NaN counts as 0.

    Example:
        >>> from jaxquant import rotations
        >>> normalized(rotations.Identity(dim=2), jnp.array([3.0, 4.0]))[0]
        Array(5., dtype=float32)
    """
    norm, direction = split_norm(jnp.nan_to_num(x.astype(jnp.float32)))
    return norm, rotation.rotate(direction * rotation.dim**0.5)


def correction(
    rule: ScaleRule, y: Float[Array, "*batch dim"], levels: Float[Array, "*batch dim"]
) -> Float[Array, "*batch"]:
    """Give the factor of the norm that a scale rule asks for, once the levels of coordinates y are known.

    Raises:
        ValueError: the rule is not one of those of `quantizers.Scalar`.

    Example:
        >>> correction("preserve", jnp.ones(4), jnp.full(4, 0.5))
        Array(2., dtype=float32)
    """
    along = jnp.sum(y * levels, axis=-1)
    energy = jnp.maximum(jnp.sum(levels * levels, axis=-1), jnp.finfo(jnp.float32).eps)
    match rule:
        case "norm":
            return jnp.ones_like(energy)
        case "preserve":
            return (y.shape[-1] / energy) ** 0.5
        case "unbiased":
            return y.shape[-1] / jnp.maximum(along, jnp.finfo(jnp.float32).eps)  # 0 for a zero vector only
        case "least_squares":
            return along / energy
        case _:
            raise ValueError(f"scale must be norm, preserve, unbiased or least_squares, got {rule!r}")


def rounded(x: Float[Array, "*batch"], dtype: ScaleDtype) -> Float[Array, "*batch"]:
    """Round to a dtype, into its finite range.

    Example:
        >>> float(rounded(jnp.array(1e9), "float16"))
        65504.0
    """
    limit = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -limit, limit).astype(dtype)
