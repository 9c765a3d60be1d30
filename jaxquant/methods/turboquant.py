"""TurboQuant: a random rotation and an optimal scalar codebook, without looking at the data.

`mse` is the paper's first quantizer (algorithm 1) and `prod` its second (algorithm 2), which spends one of its bits on
a sign sketch so that inner products are unbiased. Under a softmax the sketch's variance is reported to cost more than
the bias it removes, so caches use `mse`: `prod` is there for retrieval and for comparison.

References:
    A. Zandieh, M. Daliri, M. Hadian, V. Mirrokni, "TurboQuant: Online vector quantization with near-optimal distortion
    rate", arXiv:2504.19874, algorithms 1 and 2, theorems 1 and 2.

Differs from the paper: the rotation is a randomized Hadamard transform unless `rotation="haar"`; three more rules for
the stored scale are offered; where fused kernels are to read them, levels of 2 bits are equidistant and levels of 3
and 4 bits rounded; the sketch of `prod` is orthogonal.
"""

from typing import Literal

import jax
from jaxtyping import PRNGKeyArray

from jaxquant import codebooks, quantizers, rotations, sketch
from jaxquant._kernels import nvrtc


def mse(
    key: PRNGKeyArray,
    *,
    dim: int,
    bits: int,
    rotation: Literal["hadamard", "haar", "rotor", "identity"] = "hadamard",
    rounds: int | None = None,
    scale: quantizers.ScaleRule = "norm",
    scale_dtype: quantizers.ScaleDtype = "float16",
    fused: bool | None = None,
) -> quantizers.Scalar:
    """Build the quantizer of least squared error.

    Args:
        key: of the rotation.
        dim: of the vectors.
        bits: a coordinate, 1 to 8.
        rotation: "rotor" and "identity" are ablations.
        rounds: of a Hadamard rotation. None takes 3 where the scale is the norm and 1 where it corrects the length;
            the documentation's table of rotations says why.
        scale: what the stored scale keeps right; see `quantizers.Scalar`.
        scale_dtype: of the stored scale.
        fused: take levels that fused kernels read: equidistant at 2 bits (1.2 % more squared error), rounded to 8 bits
            at 3 and 4 (less than .3 %). None does so where JAX sees an NVIDIA GPU.

    Raises:
        ValueError: an argument is not one of those listed; `dim` is odd with a Hadamard rotation.

    Example:
        >>> mse(jax.random.key(0), dim=128, bits=4).codebook.centroids.shape
        (16,)
    """
    rules = quantizers.ScaleRule.__args__
    if scale not in rules:
        raise ValueError(f"scale must be one of {', '.join(rules)}, got {scale!r}")
    match rotation:
        case "hadamard":
            turn = rotations.hadamard(key, dim, rounds=(3 if scale == "norm" else 1) if rounds is None else rounds)
        case "haar":
            turn = rotations.haar(key, dim)
        case "rotor":
            turn = rotations.rotor(key, dim)
        case "identity":
            turn = rotations.Identity(dim=dim)
        case _:
            raise ValueError(f"rotation must be hadamard, haar, rotor or identity, got {rotation!r}")
    fused = nvrtc.available() if fused is None else fused
    if fused and bits == 2:
        codebook = codebooks.uniform(bits, dim=dim)
    else:
        codebook = codebooks.lloyd_max(bits, dim=dim, grid=fused and bits in (3, 4))
    return quantizers.Scalar(rotation=turn, codebook=codebook, bits=bits, scale=scale, scale_dtype=scale_dtype)


def prod(
    key: PRNGKeyArray,
    *,
    dim: int,
    bits: int,
    rotation: Literal["hadamard", "haar"] = "hadamard",
    scale_dtype: quantizers.ScaleDtype = "float16",
) -> quantizers.Residual:
    """Build the quantizer of unbiased inner products: (bits - 1)-bit codes and one sign a coordinate.

    Raises:
        ValueError: `bits` is not in 2..8, or an argument of `mse` is wrong.

    Example:
        >>> quantizer = prod(jax.random.key(0), dim=128, bits=4)
        >>> quantizers.quantize(quantizer, jax.numpy.ones(128)).nbytes
        68
    """
    if bits not in range(2, 9):
        raise ValueError(f"bits must be an integer from 2 to 8, got {bits!r}")
    first, second = jax.random.split(key)
    scalar = mse(first, dim=dim, bits=bits - 1, rotation=rotation, scale_dtype=scale_dtype)
    return quantizers.Residual(scalar=scalar, sketch=sketch.orthogonal(second, dim))


def kv(
    key: PRNGKeyArray, *, dim: int, bits_k: int, bits_v: int, fused: bool | None = None
) -> tuple[quantizers.Scalar, quantizers.Scalar]:
    """Build the pair of quantizers for a cache: keys that keep their length, and values without bias at low bits.

    A key's length sets the temperature of the softmax. Errors of values average out over tokens and a bias does not, so
    at 1 and 2 bits, where it is 6 % and more, values are stored without it; above, they keep their length too, at a
    smaller error. Perplexity agrees (docs/evaluation.md).

    Args:
        key: of both rotations.
        dim: of the vectors.
        bits_k: a coordinate of keys.
        bits_v: a coordinate of values.
        fused: take levels that fused kernels read; see `mse`.

    Example:
        >>> keys, values = kv(jax.random.key(0), dim=128, bits_k=4, bits_v=2)
        >>> keys.scale, values.scale
        ('preserve', 'unbiased')
    """
    first, second = jax.random.split(key)
    of_keys, of_values = scales(bits_v)
    return (
        mse(first, dim=dim, bits=bits_k, scale=of_keys, fused=fused),
        mse(second, dim=dim, bits=bits_v, scale=of_values, fused=fused),
    )


def scales(bits_v: int | float) -> tuple[quantizers.ScaleRule, quantizers.ScaleRule]:
    """Give what the scales of keys and values keep right in a cache, whatever the code; see `kv`.

    Example:
        >>> scales(2)
        ('preserve', 'unbiased')
    """
    return "preserve", "unbiased" if bits_v < 3 else "preserve"


EXAMPLES = (
    lambda: mse(jax.random.key(0), dim=64, bits=3),
    lambda: prod(jax.random.key(0), dim=64, bits=3),
)
