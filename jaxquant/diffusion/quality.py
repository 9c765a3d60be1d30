"""How far a picture is from the one it should be: peak signal-to-noise ratio, and what a blank picture would score."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.jit
def psnr(
    reference: Float[Array, "pictures ..."],
    picture: Float[Array, "pictures ..."],
    *,
    peak: float | Float[Array, ""] = 1.0,
) -> Float[Array, " pictures"]:
    """Give 10 log10(peak² / mean squared error) for each picture, in decibels; infinite for equal pictures.

    The mean is over all pixels and channels of a picture before the logarithm, not of the decibels of its parts. Where
    a pixel is NaN, so is the result.

    Args:
        reference: pictures of any shape, batch first.
        picture: compared with them.
        peak: the largest value a pixel can have less the smallest: 1, 2 for [-1, 1], or 255.

    Raises:
        ValueError: shapes differ.

    Example:
        >>> round(float(psnr(jnp.zeros((1, 8, 8, 3)), jnp.full((1, 8, 8, 3), 0.1))[0]), 3)
        20.0
    """
    if reference.shape != picture.shape:
        raise ValueError(f"picture has shape {picture.shape}; it must be the reference's, {reference.shape}")
    error = reference.astype(jnp.float32) - picture.astype(jnp.float32)
    mean = jnp.mean(jnp.square(error), axis=tuple(range(1, error.ndim)))
    return 10 * jnp.log10(jnp.square(jnp.asarray(peak, jnp.float32)) / mean)


@jax.jit
def blank_psnr(
    reference: Float[Array, "pictures ... channels"], *, peak: float | Float[Array, ""] = 1.0
) -> Float[Array, " pictures"]:
    """Give the PSNR of the best picture of a single colour: what a score must exceed to mean anything.

    Args:
        reference: pictures, batch first, channels last.
        peak: as in `psnr`.

    Example:
        >>> halves = jnp.concatenate([jnp.zeros((1, 8, 4, 3)), jnp.ones((1, 8, 4, 3))], axis=2)
        >>> round(float(blank_psnr(halves)[0]), 3)
        6.021
    """
    wide = reference.astype(jnp.float32)
    colour = jnp.mean(wide, axis=tuple(range(1, wide.ndim - 1)), keepdims=True)
    return psnr(wide, jnp.broadcast_to(colour, wide.shape), peak=peak)
