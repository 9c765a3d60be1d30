"""Trellis-coded quantization of rotated vectors: TurboQuant with a better code for the coordinates, at the same bytes.

A random rotation makes coordinates normal, of one variance. A scalar codebook leaves 1.6 to 3.9 dB to the bound of
rate-distortion theory there, and a trellis of 256 states 0.5 to 0.9. It decodes by one table lookup a coordinate, as a
scalar codebook does, only that the index reaches into the codes of the next coordinates.

References:
    A. Tseng, Q. Sun, D. Hou, C. De Sa, "QTIP: Quantization with trellises and incoherence processing",
    arXiv:2406.11235; M. Marcellin, T. Fischer, "Trellis coded quantization of memoryless and Gauss-Markov sources",
    IEEE Transactions on Communications 38 (1990); the rotation and the norm are those of A. Zandieh, M. Daliri, M.
    Hadian, V. Mirrokni, "TurboQuant", arXiv:2504.19874.

Differs from the paper: QTIP quantizes weights, with 2**16 windows and a Hessian; here every vector is a sequence of
its own, the trellis is small enough to search online, and its tables are trained for it. See `jaxquant.trellis`.
"""

import jax
from jaxtyping import PRNGKeyArray

from jaxquant import quantizers, rotations, trellis
from jaxquant.methods import turboquant

_PATTERNS = {0: (0,), 1: (1, 0, 0, 0), 2: (1, 0), 3: (1, 1, 1, 0)}  # of quarters of a bit above the whole ones


def mse(
    key: PRNGKeyArray,
    *,
    dim: int,
    bits: int | float,
    states: int = 256,
    kind: trellis.Kind = "table",
    scale: quantizers.ScaleRule = "norm",
    scale_dtype: quantizers.ScaleDtype = "float16",
) -> trellis.Trellis:
    """Build the quantizer of least squared error.

    Args:
        key: of the rotation.
        dim: of the vectors, a multiple of 8.
        bits: a coordinate, from 1 to 6 in steps of a quarter: widths of neighbours differ where it is not whole.
        states: of the trellis, a power of 2 from 4 to 1024: the search takes so many times longer, the error falls.
            With 512 states there are 5 bits at most, and with 1024 there are 4.
        kind: where levels come from: a trained table, or a formula, "1mad" or "3inst", that needs no memory.
        scale: what the stored scale keeps right; see `quantizers.Scalar`.
        scale_dtype: of the stored scale.

    Raises:
        ValueError: an argument is not one of those listed.

    Example:
        >>> quantizer = mse(jax.random.key(0), dim=128, bits=2.25)
        >>> quantizers.quantize(quantizer, jax.numpy.ones(128)).nbytes
        38
    """
    rules = quantizers.ScaleRule.__args__
    if scale not in rules:
        raise ValueError(f"scale must be one of {', '.join(rules)}, got {scale!r}")
    if dim % 8 or dim < 8:
        raise ValueError(f"dim must be a multiple of 8, got {dim}")
    if not 1 <= bits <= 6 or bits * 4 % 1:
        raise ValueError(f"bits must be from 1 to 6 in steps of a quarter, got {bits!r}")
    pattern = tuple(int(bits) + more for more in _PATTERNS[int(bits * 4) % 4])
    return trellis.Trellis(
        rotation=rotations.hadamard(key, dim, rounds=3 if scale == "norm" else 1),
        code=trellis.code(((pattern, dim // len(pattern)),), states=states, kind=kind),
        scale=scale,
        scale_dtype=scale_dtype,
    )


def kv(
    key: PRNGKeyArray, *, dim: int, bits_k: int | float, bits_v: int | float, states: int = 256
) -> tuple[trellis.Trellis, trellis.Trellis]:
    """Build the pair of quantizers for a cache: keys keep their length, and values, below 3 bits, the inner product.

    Example:
        >>> keys, values = kv(jax.random.key(0), dim=64, bits_k=3, bits_v=2.5, states=16)
        >>> keys.code.n_bytes, values.code.n_bytes
        (24, 20)
    """
    first, second = jax.random.split(key)
    of_keys, of_values = turboquant.scales(bits_v)
    return (
        mse(first, dim=dim, bits=bits_k, states=states, scale=of_keys),
        mse(second, dim=dim, bits=bits_v, states=states, scale=of_values),
    )


EXAMPLES = (
    lambda: mse(jax.random.key(0), dim=64, bits=2, states=16),
    lambda: mse(jax.random.key(0), dim=64, bits=2.5, states=8, scale="preserve"),
    lambda: mse(jax.random.key(0), dim=32, bits=3, states=64, kind="1mad"),
    lambda: mse(jax.random.key(0), dim=32, bits=3, states=64, kind="3inst", scale="least_squares"),
)
