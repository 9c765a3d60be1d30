"""OSCAR: rotations in which every coordinate matters equally to attention, then 2-bit integers per token.

Keys are turned into the eigenvectors of E[q q^T], values into those of their covariance weighted by attention, and a
Hadamard transform spreads each over all coordinates, so that no coordinate carries more of what queries read, or of
what outputs sum, than another. Codes are asymmetric integers over a range that is cut a little at both ends.

References:
    Z. Zhou, D. Zhuang, J. Li, Z. Chen, S. L. Song, B. Athiwaratkun, X. Wu, "OSCAR: Offline spectral covariance-aware
    rotation for 2-bit KV cache quantization", arXiv:2605.17757 (rotations; clipping .96 for keys and .92 for values).

Differs from the paper: built from its abstract and from notes about it, not from its text; no bit-reversal
permutation, which only matters with more than one range a vector; the clipping is a share of the range; one range a
vector; the rotation of values stays in the quantizer (`calibrate.absorb` can move one into a model's weights).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from jaxquant import rotations
from jaxquant.methods import uniform

CLIP_K, CLIP_V = 0.96, 0.92


def fit(
    key: PRNGKeyArray,
    *,
    bits_k: int,
    bits_v: int,
    query_moments: Float[np.ndarray, "layers kv_heads dim dim"],
    weighted_values: Float[np.ndarray, "layers kv_heads dim dim"],
) -> tuple[tuple[uniform.Uniform, ...], tuple[uniform.Uniform, ...]]:
    """Build the quantizers of every layer's keys and values; one rotation serves all kv heads of a layer.

    Args:
        key: of the signs of the Hadamard transforms.
        bits_k: a coordinate of keys.
        bits_v: a coordinate of values.
        query_moments: sum of q q^T over the queries that read a kv head.
        weighted_values: sum of v v^T times the attention that v receives.

    Example:
        >>> moments = np.broadcast_to(np.eye(64), (2, 2, 64, 64))
        >>> keys, values = fit(jax.random.key(0), bits_k=2, bits_v=2, query_moments=moments, weighted_values=moments)
        >>> len(keys), keys[0].dim
        (2, 64)
    """
    first, second = jax.random.split(key)
    return _half(first, query_moments, bits_k, CLIP_K), _half(second, weighted_values, bits_v, CLIP_V)


def spread(key: PRNGKeyArray, moments: Float[np.ndarray, "dim dim"]) -> rotations.Dense:
    """Rotate into eigenvectors, then spread them: the rotated second moments have (nearly) equal diagonals.

    Example:
        >>> rotation = spread(jax.random.key(0), np.diag([9.0, 1.0, 1.0, 1.0]))
        >>> turned = rotation.matrix @ jnp.diag(jnp.array([9.0, 1.0, 1.0, 1.0])) @ rotation.matrix.T
        >>> np.asarray(jnp.diagonal(turned)).round(3)
        array([3., 3., 3., 3.], dtype=float32)
    """
    _, vectors = np.linalg.eigh((moments + moments.T) / 2)
    mixing = rotations.hadamard(key, len(moments))
    return rotations.Dense(matrix=mixing.rotate(jnp.asarray(vectors, jnp.float32)).T)


def _half(key: PRNGKeyArray, moments: np.ndarray, bits: int, clip: float) -> tuple[uniform.Uniform, ...]:
    dim = moments.shape[-1]
    size = np.trace(moments, axis1=-2, axis2=-1)[..., None, None]
    layers = (moments / size).sum(axis=1)  # every head counts the same
    return tuple(uniform.asymmetric(dim=dim, bits=bits, rotation=spread(key, each), clip=clip) for each in layers)


EXAMPLES = (
    uniform.asymmetric(dim=64, bits=4, rotation=spread(jax.random.key(0), np.diag(np.arange(1.0, 65.0))), clip=CLIP_K),
)
