"""fraQtl: values in the eigenbasis that attention sums them in, the first eigen-coordinates apart and with more bits.

What a value's error costs depends on the attention that it gets, so the basis is that of

    V^T diag(a^T a) V = U diag(w) U^T,

a the attention weights and V the values of a head. No direction is deleted: one coordinate in `share`, those of
largest w, holds `bits + share - 1` bits and any other `bits - 1`, which makes `bits` in the mean. Where the first
coordinates hold a part p of the energy of normal values, the expected squared error is

    p D(bits + share - 1) + (1 - p) D(bits - 1),

D the error of TurboQuant. It is below D(bits) where p is large.

References:
    S. Salfati, "Quantization dominates rank reduction for KV-cache compression", arXiv:2604.11501 (the values'
    eigenbasis; directions set apart; quantized keys and values beside values alone).

Differs from the paper: built from its abstract and from notes about it. Attention weights of different tokens are taken
for unrelated, which leaves the diagonal of a^T a. 64 of 128 directions (or 32, "a quarter apart") hold one bit (or
three) more than asked for, in place of 16 bits. Each part is coded by TurboQuant, with a norm and a rotation within
the part, in place of integers of a fixed range for each coordinate, which clip vectors that are unlike the others. The
paper leaves keys alone or treats them as values, in the eigenbasis of their own second moments: here TurboQuant codes
them at as many bits, for rows at equal bytes, and "keys too" does the latter.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxquant import quantizers
from jaxquant._pytree import pytree
from jaxquant.methods import turboquant

_LARGEST = 2.0**100  # of an element: sums stay finite


@pytree
class Parts:
    """Codes of a vector in two parts.

    Attributes:
        first: of the coordinates set apart.
        others: of the rest.
    """

    first: quantizers.Quantized
    others: quantizers.Quantized

    @property
    def nbytes(self) -> int:
        """Bytes held, everything included."""
        return self.first.nbytes + self.others.nbytes


@pytree
class Split:
    """A basis, and a quantizer for each of two runs of coordinates.

    Attributes:
        basis: orthonormal rows; with an axis of heads for vectors [batch, kv_heads, tokens, dim], or without for any.
        first: quantizer of the first coordinates.
        others: of the rest.
    """

    basis: Float[Array, "*heads dim dim"]
    first: quantizers.Scalar
    others: quantizers.Scalar

    @property
    def dim(self) -> int:
        """Length of the vectors."""
        return self.first.dim + self.others.dim

    def quantize(self, x: Float[Array, "*batch dim"], /) -> Parts:
        """Code both runs of coordinates."""
        first, others = self._cut(self._turn(jnp.clip(jnp.nan_to_num(x.astype(jnp.float32)), -_LARGEST, _LARGEST)))
        return Parts(first=self.first.quantize(first), others=self.others.quantize(others))

    def expand(self, code: Parts, /) -> Float[Array, "*batch dim"]:
        """Put what both expand to side by side."""
        return jnp.concatenate([self.first.expand(code.first), self.others.expand(code.others)], axis=-1)

    def restore(self, y: Float[Array, "*batch dim"], /) -> Float[Array, "*batch dim"]:
        """Restore both, and sum the directions of the basis."""
        first, others = self._cut(y)
        y = jnp.concatenate([self.first.restore(first), self.others.restore(others)], axis=-1)
        return jnp.matmul(y, self.basis, precision="highest")

    def project(self, q: Float[Array, "*batch dim"], /) -> Float[Array, "*batch dim"]:
        """Turn into the basis, and project for both."""
        first, others = self._cut(self._turn(q.astype(jnp.float32)))
        return jnp.concatenate([self.first.project(first), self.others.project(others)], axis=-1)

    def _turn(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        return jnp.matmul(x, self.basis.mT, precision="highest")

    def _cut(self, y: Float[Array, "*batch dim"]) -> tuple[Array, Array]:
        return y[..., : self.first.dim], y[..., self.first.dim :]


def split(
    key: PRNGKeyArray,
    moments: Float[np.ndarray, "*heads dim dim"],
    *,
    bits: int,
    share: int = 2,
    scale: quantizers.ScaleRule | None = None,
) -> Split:
    """Build the quantizer of vectors in the eigenbasis of second moments, which each head has its own of.

    Args:
        key: of the rotations within the two parts.
        moments: symmetric; eigenvectors of its largest eigenvalues are set apart.
        bits: a coordinate in the mean, at least 2 and at most `9 - share`.
        share: one coordinate in so many is set apart.
        scale: what the norms of both parts keep right; None takes what TurboQuant does for values of their bits.

    Raises:
        ValueError: bits are out of range, or vectors have no such share.

    Example:
        >>> quantizer = split(jax.random.key(0), np.diag(np.arange(1.0, 65.0)), bits=3)
        >>> np.abs(np.asarray(quantizer.basis)).argmax(axis=1)[:4], quantizer.first.bits, quantizer.others.bits
        (array([63, 62, 61, 60]), 4, 2)
    """
    dim = moments.shape[-1]
    if share < 2 or dim % (2 * share):
        raise ValueError(f"share must be at least 2 and divide half of dim = {dim}, got {share}")
    if bits not in range(2, 10 - share):
        raise ValueError(f"bits must be an integer from 2 to {9 - share}, got {bits!r}")
    vectors = np.linalg.eigh((moments + np.swapaxes(moments, -1, -2)) / 2)[1][..., ::-1]
    keys, counts, widths = jax.random.split(key), (dim // share, dim - dim // share), (bits + share - 1, bits - 1)
    first, others = (
        turboquant.mse(each, dim=count, bits=width, scale=scale or turboquant.scales(width)[1])
        for each, count, width in zip(keys, counts, widths, strict=True)
    )
    return Split(basis=jnp.asarray(np.swapaxes(vectors, -1, -2), jnp.float32), first=first, others=others)


def fit(
    key: PRNGKeyArray,
    *,
    bits_k: int,
    bits_v: int,
    weighted_values: Float[np.ndarray, "layers kv_heads dim dim"],
    share: int = 2,
) -> tuple[tuple[quantizers.Scalar, ...], tuple[Split, ...]]:
    """Build the quantizers of every layer: TurboQuant for keys, and a basis of each head's own for values.

    Args:
        key: of the rotations.
        bits_k: a coordinate of keys.
        bits_v: a coordinate of values in the mean; see `split`.
        weighted_values: sum of v v^T times the squared attention that v receives.
        share: one coordinate of values in so many is set apart.

    Example:
        >>> moments = np.broadcast_to(np.eye(64), (2, 2, 64, 64))
        >>> keys, values = fit(jax.random.key(0), bits_k=2, bits_v=2, weighted_values=moments)
        >>> quantizers.quantize(values[1], jnp.ones((1, 2, 5, 64))).nbytes / 10
        20.0
    """
    of_keys, of_values = jax.random.split(key)
    keys, _ = turboquant.kv(of_keys, dim=weighted_values.shape[-1], bits_k=bits_k, bits_v=bits_v)
    values = tuple(split(of_values, each, bits=bits_v, share=share) for each in weighted_values)
    return (keys,) * len(values), values


def fit_quarter(
    key: PRNGKeyArray, *, bits_k: int, bits_v: int, weighted_values: Float[np.ndarray, "layers kv_heads dim dim"]
) -> tuple[tuple[quantizers.Scalar, ...], tuple[Split, ...]]:
    """Build the quantizers of every layer, a quarter of the values' coordinates apart; see `fit`."""
    return fit(key, bits_k=bits_k, bits_v=bits_v, weighted_values=weighted_values, share=4)


def fit_both(
    key: PRNGKeyArray,
    *,
    bits_k: int,
    bits_v: int,
    key_moments: Float[np.ndarray, "layers kv_heads dim dim"],
    weighted_values: Float[np.ndarray, "layers kv_heads dim dim"],
) -> tuple[tuple[Split, ...], tuple[Split, ...]]:
    """Build the quantizers of every layer, keys in the eigenbasis of their second moments; see `fit`."""
    of_keys, of_values = jax.random.split(key)
    return (
        tuple(split(of_keys, each, bits=bits_k, scale=turboquant.scales(bits_v)[0]) for each in key_moments),
        tuple(split(of_values, each, bits=bits_v) for each in weighted_values),
    )


VARIANTS = {"a quarter apart": fit_quarter, "keys too": fit_both}
EXAMPLES = (
    lambda: split(jax.random.key(0), np.diag(np.arange(1.0, 65.0)), bits=3),
    lambda: split(jax.random.key(0), np.diag(np.arange(1.0, 65.0)), bits=4, share=4),
)
