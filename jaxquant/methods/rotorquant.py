"""RotorQuant: TurboQuant with rotations of three coordinates each instead of one of all.

Cheap, and not what it promises: a triple that holds an outlier keeps all of its energy, so that the premise of the
codebook, coordinates that look alike, does not hold for keys with outlier channels. It is here to be measured.

References:
    J. D. Pope, "RotorQuant: Clifford algebra vector quantization for LLM KV cache compression", technical report,
    Scrya, March 2026, https://www.scrya.com/rotorquant (not on arXiv; described and compared with in "IsoQuant",
    arXiv:2603.28430).

Differs from the paper: rotors are unit quaternions applied as 3x3 matrices, which is the same map as the sandwich
product in Cl(3, 0) at fewer multiplications; no sign sketch of the residual; dim % 3 coordinates stay as they are; the
stored scale makes up for what the code shortens.
"""

import jax
from jaxtyping import PRNGKeyArray

from jaxquant import codebooks, quantizers, rotations
from jaxquant.methods import turboquant


def rotor(key: PRNGKeyArray, *, dim: int, bits: int, scale: quantizers.ScaleRule = "preserve") -> quantizers.Scalar:
    """Build the quantizer.

    Args:
        key: of the rotors.
        dim: of the vectors, 3 or more.
        bits: a coordinate, 1 to 8.
        scale: what the stored scale keeps right; see `quantizers.Scalar`.

    Example:
        >>> quantizer = rotor(jax.random.key(0), dim=128, bits=4)
        >>> quantizer.rotation.quaternions.size
        168
    """
    book = codebooks.lloyd_max(bits, dim=dim)
    return quantizers.Scalar(rotation=rotations.rotor(key, dim), codebook=book, bits=bits, scale=scale)


def kv(key: PRNGKeyArray, *, dim: int, bits_k: int, bits_v: int) -> tuple[quantizers.Scalar, quantizers.Scalar]:
    """Build the pair of quantizers for a cache; scales keep what TurboQuant's do.

    Example:
        >>> keys, values = kv(jax.random.key(0), dim=64, bits_k=4, bits_v=4)
        >>> quantizers.quantize(keys, jax.numpy.ones(64)).nbytes
        34
    """
    first, second = jax.random.split(key)
    of_keys, of_values = turboquant.scales(bits_v)
    return (
        rotor(first, dim=dim, bits=bits_k, scale=of_keys),
        rotor(second, dim=dim, bits=bits_v, scale=of_values),
    )


EXAMPLES = (lambda: rotor(jax.random.key(0), dim=64, bits=3),)
