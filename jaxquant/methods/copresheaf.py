"""Codebooks of their own for every type of head: levels fitted to how a head's rotated coordinates are distributed.

Heads of one layer are sorted into a few types by the quantiles of their coordinates, and each type has a codebook: data
on each kind of cell, with maps between the kinds, as in a copresheaf; the map from a head to its type is the one
here. A rotation brings most heads close to one and the same normal density, so that there is little left to gain.

References:
    M. Hajij et al., "Copresheaf topological neural networks: A generalized deep learning framework", arXiv:2505.21251
    (the idea of a space of its own for every cell; it has no quantizer).

Differs from the paper: that is about message passing in networks. Only "each kind of head has its own space" is taken.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from jaxquant import codebooks, packing, quantizers, rotations
from jaxquant._pytree import pytree, static
from jaxquant.methods import turboquant
from jaxquant.protocols import Rotation

_QUANTILES = np.linspace(0.01, 0.99, 33)


@pytree
class Typed:
    """Norm, rotation and the codebook of the head's type.

    Attributes:
        rotation: applied first.
        levels: in increasing order, for coordinates of unit variance; with an axis of heads for vectors
            [batch, kv_heads, tokens, dim], or without for any.
        bits: of a coordinate.
        scale: what the stored scale keeps right; see `quantizers.Scalar`.
    """

    rotation: Rotation
    levels: Float[Array, "*heads levels"]
    bits: int = static()
    scale: quantizers.ScaleRule = static(default="preserve")

    @property
    def dim(self) -> int:
        """Length of the vectors."""
        return self.rotation.dim

    def quantize(self, x: Float[Array, "*batch dim"], /) -> quantizers.Quantized:
        """Code vectors."""
        norm, y = quantizers.normalized(self.rotation, x)
        codes = jnp.zeros(y.shape, jnp.uint8)
        for i in range(2**self.bits - 1):
            codes += (y > (self._level(i) + self._level(i + 1)) / 2).astype(jnp.uint8)
        scales = norm * quantizers.correction(self.scale, y, self._lookup(codes))
        return quantizers.Quantized(
            codes=packing.pack(codes, bits=self.bits), scales=quantizers.rounded(scales, "float16")
        )

    def expand(self, code: quantizers.Quantized, /) -> Float[Array, "*batch dim"]:
        """Look up and scale."""
        assert code.scales is not None
        levels = self._lookup(packing.unpack(code.codes, bits=self.bits, length=self.dim))
        return levels * (code.scales.astype(jnp.float32) * self.dim**-0.5)[..., None]

    def restore(self, y: Float[Array, "*batch dim"], /) -> Float[Array, "*batch dim"]:
        """Rotate back."""
        return self.rotation.unrotate(y)

    def project(self, q: Float[Array, "*batch dim"], /) -> Float[Array, "*batch dim"]:
        """Rotate."""
        return self.rotation.rotate(q.astype(jnp.float32))

    def _level(self, i: int) -> Array:
        """Give level i of each head, with room for tokens and coordinates where there are heads."""
        level = self.levels[..., i]
        return level[..., None, None] if level.ndim else level

    def _lookup(self, codes: UInt8[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        y = jnp.broadcast_to(self._level(0), codes.shape)
        for i in range(1, 2**self.bits):
            y = jnp.where(codes >= np.uint8(i), self._level(i), y)
        return y


def fit(
    key: PRNGKeyArray,
    *,
    bits_k: int,
    bits_v: int,
    key_samples: Float[np.ndarray, "layers kv_heads samples dim"],
    value_samples: Float[np.ndarray, "layers kv_heads samples dim"],
    types: int = 4,
) -> tuple[tuple[Typed, ...], tuple[Typed, ...]]:
    """Sort the heads of all layers into types, and fit a codebook to each.

    Args:
        key: of both rotations.
        bits_k: a coordinate of keys, 1 to 6.
        bits_v: a coordinate of values, 1 to 6.
        key_samples: keys, after any position encoding.
        value_samples: values.
        types: of heads, for keys and for values.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(2, 2, 200, 64))
        >>> keys, values = fit(jax.random.key(0), bits_k=2, bits_v=2, key_samples=x, value_samples=x, types=2)
        >>> keys[1].levels.shape
        (2, 4)
    """
    if types < 1:
        raise ValueError(f"types must be at least 1, got {types}")
    first, second = jax.random.split(key)
    of_keys, of_values = turboquant.scales(bits_v)
    return (
        _half(first, key_samples, bits_k, types, of_keys),
        _half(second, value_samples, bits_v, types, of_values),
    )


def _half(
    key: PRNGKeyArray, samples: np.ndarray, bits: int, types: int, scale: quantizers.ScaleRule
) -> tuple[Typed, ...]:
    if bits not in range(1, 7):
        raise ValueError(f"bits must be an integer from 1 to 6, got {bits!r}")
    layers, heads, _, dim = samples.shape
    turn = rotations.hadamard(key, dim)
    norm, y = (np.asarray(part) for part in quantizers.normalized(turn, jnp.asarray(samples, jnp.float32)))
    y = y.reshape(layers * heads, -1)
    weights = np.repeat(norm.astype(np.float64).reshape(layers * heads, -1) ** 2, dim, axis=1)
    kinds = _types(np.quantile(y, _QUANTILES, axis=1).T, min(types, layers * heads))
    tables = np.zeros((layers * heads, 2**bits), np.float32)
    for kind in np.unique(kinds):
        members = kinds == kind
        tables[members] = codebooks.fitted(y[members].ravel(), weights[members].ravel(), bits=bits).centroids
    tables = tables.reshape(layers, heads, -1)
    return tuple(Typed(rotation=turn, levels=jnp.asarray(table), bits=int(bits), scale=scale) for table in tables)


def _types(features: Float[np.ndarray, "heads features"], count: int) -> np.ndarray:
    """Sort heads into types by k-means, from heads that are far apart."""
    centres = features[:1]
    while len(centres) < count:
        distance = np.min(np.sum((features[:, None] - centres) ** 2, axis=-1), axis=1)
        centres = np.append(centres, features[[np.argmax(distance)]], axis=0)
    kinds = np.zeros(len(features), np.int64)
    for _ in range(20):
        kinds = np.argmin(np.sum((features[:, None] - centres) ** 2, axis=-1), axis=1)
        centres = np.stack(
            [features[kinds == i].mean(axis=0) if (kinds == i).any() else centres[i] for i in range(count)]
        )
    return kinds


EXAMPLES = (
    lambda: Typed(rotation=rotations.hadamard(jax.random.key(0), 64), levels=codebooks.lloyd_max(3).centroids, bits=3),
)
