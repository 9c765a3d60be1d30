"""KVQuant: levels fitted to the model, channel by channel for keys, with the worst coordinates kept apart.

Keys are centred and scaled by constants of each channel, found in calibration; values by the range of each token. What
is left is coded with levels that all channels of a layer share, fitted by weighted k-means. The few coordinates that
this serves worst are kept beside the codes as 16-bit corrections ("dense and sparse").

References:
    C. Hooper, S. Kim, H. Mohammadzadeh, M. W. Mahoney, Y. S. Shao, K. Keutzer, A. Gholami, "KVQuant: Towards 10 million
    context length LLM inference with KV cache quantization", arXiv:2401.18079, s. 3.1 to 3.4.

Differs from the paper: keys are coded as attention reads them, after the position encoding, not before it; every vector
has the same number of corrections, those of largest error, so that a token takes a fixed number of bytes, where the
paper stores all coordinates beyond a threshold; the weights of the k-means are E[q_c^2] of each channel for keys and 1
for values instead of squared gradients. The first token, which the paper keeps exact, is the cache's `sinks=1`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray, UInt8

from jaxquant import codebooks, packing, quantizers
from jaxquant._pytree import pytree, static

_LARGEST = 2.0**100
_LEAST = 2.0**-14  # half range of a token
_KEPT = 0.99  # share of a channel's samples inside its range


@pytree
class Sparse:
    """Codes of vectors, and corrections of a few coordinates.

    Attributes:
        codes: packed codes.
        places: coordinates that are corrected.
        corrections: what is added there, in units of the scale.
        scales: half range of each vector, or None where channels have constant ranges.
        zeros: middle of each vector's range, or None likewise.
    """

    codes: UInt8[Array, "*batch n_bytes"]
    places: UInt8[Array, "*batch outliers"]
    corrections: Float[Array, "*batch outliers"]
    scales: Float[Array, "*batch"] | None = None
    zeros: Float[Array, "*batch"] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held, everything included."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


@pytree
class Fitted:
    """Levels for normalized coordinates, with corrections.

    The constants may have leading axes that fit those of the vectors before their last two, such as kv_heads for
    vectors [batch, kv_heads, tokens, dim].

    Attributes:
        middle: of each channel's range; None where the range of each token is measured and stored.
        half: of each channel's range; None likewise.
        levels: in increasing order.
        dim: length of the vectors, 256 at most.
        bits: of a coordinate.
        outliers: corrections of a vector.
    """

    middle: Float[Array, "*heads dim"] | None
    half: Float[Array, "*heads dim"] | None
    levels: codebooks.Codebook
    dim: int = static()
    bits: int = static()
    outliers: int = static()

    def quantize(self, x: Float[Array, "*batch dim"], /) -> Sparse:
        """Code vectors."""
        x = jnp.clip(jnp.nan_to_num(x.astype(jnp.float32)), -_LARGEST, _LARGEST)
        scales = zeros = None
        if self.middle is not None and self.half is not None:
            y = (x - _rows(self.middle)) / _rows(self.half)
        else:
            low, high = _range(x, self.outliers)
            zeros = quantizers.rounded((low + high) / 2, "float16")
            scales = quantizers.rounded((high - low) / 2, "float16")
            size = jnp.maximum(scales.astype(jnp.float32), _LEAST)
            y = (x - zeros.astype(jnp.float32)[..., None]) / size[..., None]
        codes = codebooks.assign(self.levels, y)
        missed = y - codebooks.lookup(self.levels, codes)
        _, places = lax.top_k(jnp.abs(missed), self.outliers)
        corrections = quantizers.rounded(jnp.take_along_axis(missed, places, axis=-1), "float16")
        return Sparse(
            codes=packing.pack(codes, bits=self.bits),
            places=places.astype(jnp.uint8),
            corrections=corrections,
            scales=scales,
            zeros=zeros,
        )

    def expand(self, code: Sparse, /) -> Float[Array, "*batch width"]:
        """Look up and correct; with constant ranges, the last coordinate is 1 and stands for the middle."""
        y = codebooks.lookup(self.levels, packing.unpack(code.codes, bits=self.bits, length=self.dim))
        coordinate = jnp.arange(self.dim, dtype=jnp.uint8)
        for i in range(self.outliers):
            here = coordinate == code.places[..., i : i + 1]
            y = y + jnp.where(here, code.corrections[..., i : i + 1].astype(jnp.float32), 0.0)
        if self.middle is not None:
            return jnp.concatenate([y, jnp.ones((*y.shape[:-1], 1), jnp.float32)], axis=-1)
        assert code.scales is not None
        assert code.zeros is not None
        size = jnp.maximum(code.scales.astype(jnp.float32), _LEAST)
        return y * size[..., None] + code.zeros.astype(jnp.float32)[..., None]

    def restore(self, y: Float[Array, "*batch width"], /) -> Float[Array, "*batch dim"]:
        """Undo the normalization of the channels."""
        if self.middle is None or self.half is None:
            return y
        return y[..., :-1] * _rows(self.half) + y[..., -1:] * _rows(self.middle)

    def project(self, q: Float[Array, "*batch dim"], /) -> Float[Array, "*batch width"]:
        """Scale the channels of queries, and add their product with the middle."""
        q = q.astype(jnp.float32)
        if self.middle is None or self.half is None:
            return q
        return jnp.concatenate([q * _rows(self.half), jnp.sum(q * _rows(self.middle), axis=-1, keepdims=True)], axis=-1)


def fit(
    key: PRNGKeyArray,
    *,
    bits_k: int,
    bits_v: int,
    key_samples: Float[np.ndarray, "layers kv_heads samples dim"],
    value_samples: Float[np.ndarray, "layers kv_heads samples dim"],
    query_moments: Float[np.ndarray, "layers kv_heads dim dim"],
    outliers: int | None = None,
) -> tuple[tuple[Fitted, ...], tuple[Fitted, ...]]:
    """Fit the quantizers of every layer's keys and values to samples; the key is not used.

    Args:
        key: unused.
        bits_k: a coordinate of keys, 1 to 8.
        bits_v: a coordinate of values, 1 to 8.
        key_samples: keys, after any position encoding.
        value_samples: values.
        query_moments: sum of q q^T over the queries that read a kv head.
        outliers: corrections of a vector; None takes 1 % of its coordinates, rounded up.

    Raises:
        ValueError: bits are not in 1..8, vectors are longer than 256, or outliers do not fit.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(1, 2, 500, 64))
        >>> moments = np.broadcast_to(np.eye(64), (1, 2, 64, 64))
        >>> keys, values = fit(
        ...     jax.random.key(0), bits_k=3, bits_v=3, key_samples=x, value_samples=x, query_moments=moments
        ... )
        >>> quantizers.quantize(keys[0], jnp.ones((1, 2, 5, 64))).nbytes / 10
        27.0
    """
    layers, _, _, dim = key_samples.shape
    if dim > 256:
        raise ValueError(f"vectors must have at most 256 coordinates, for a place in one byte; got {dim}")
    apart = -(-dim // 100) if outliers is None else outliers
    if not 0 <= apart < dim:
        raise ValueError(f"outliers must be from 0 to {dim - 1}, got {apart}")
    keys, values = [], []
    for layer in range(layers):
        low, high = np.quantile(key_samples[layer], [(1 - _KEPT) / 2, (1 + _KEPT) / 2], axis=1)
        middle, half = (low + high) / 2, np.maximum((high - low) / 2, 1e-6)
        weights = np.diagonal(query_moments[layer], axis1=-2, axis2=-1) * half**2
        weights = np.broadcast_to(weights[:, None], key_samples[layer].shape)
        y = (key_samples[layer] - middle[:, None]) / half[:, None]
        levels = codebooks.fitted(y.ravel(), (weights * _usual(y, apart)).ravel(), bits=bits_k)
        channels = {"middle": jnp.asarray(middle, jnp.float32), "half": jnp.asarray(half, jnp.float32)}
        keys.append(Fitted(**channels, levels=levels, dim=dim, bits=bits_k, outliers=apart))
        x = jnp.asarray(value_samples[layer], jnp.float32)
        low, high = (np.asarray(end)[..., None] for end in _range(x, apart))
        half = np.maximum((high - low) / 2, 1e-6)
        y = (value_samples[layer] - (low + high) / 2) / half
        levels = codebooks.fitted(y.ravel(), (half**2 * _usual(y, apart)).ravel(), bits=bits_v)
        values.append(Fitted(middle=None, half=None, levels=levels, dim=dim, bits=bits_v, outliers=apart))
    return tuple(keys), tuple(values)


def _usual(y: Float[np.ndarray, "*batch dim"], outliers: int) -> Bool[np.ndarray, "*batch dim"]:
    """Mark all coordinates but the `outliers` farthest out, which corrections will take care of."""
    return np.abs(y) <= -np.partition(-np.abs(y), outliers, axis=-1)[..., [outliers]]


def _range(x: Float[Array, "*batch dim"], outliers: int) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """Give the range of all coordinates but the `outliers` farthest from the mean."""
    far = jnp.abs(x - jnp.mean(x, axis=-1, keepdims=True))
    limit = lax.top_k(far, outliers + 1)[0][..., -1:]
    inside = far <= limit
    low = jnp.min(jnp.where(inside, x, jnp.inf), axis=-1)
    return low, jnp.max(jnp.where(inside, x, -jnp.inf), axis=-1)


def _rows(x: Float[Array, "*heads dim"]) -> Float[Array, "*rows"]:
    """Make room for the token axis where there is a heads axis."""
    return x[..., None, :] if x.ndim > 1 else x


def _third() -> codebooks.Codebook:
    return codebooks.Codebook(centroids=codebooks.lloyd_max(4).centroids / 3)


EXAMPLES = (
    lambda: Fitted(middle=jnp.full(64, 0.25), half=jnp.full(64, 3.0), levels=_third(), dim=64, bits=4, outliers=2),
    lambda: Fitted(middle=None, half=None, levels=_third(), dim=64, bits=4, outliers=2),
)
