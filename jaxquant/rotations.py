"""Orthogonal maps that make the coordinates of any vector look alike, so that one scalar codebook fits all of them.

After a random rotation each coordinate of a unit vector follows the sphere's marginal, close to N(0, 1/dim), whatever
the vector was. `Dense` does this exactly and costs a matrix; `Hadamard` does it nearly as well and stores signs only;
`Rotor` does not (it cannot move energy further than three coordinates) and is here for comparison.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8, PRNGKeyArray

from jaxquant._pytree import pytree, static

_LARGEST_FACTOR = 128  # a product with one matrix this large is cheap where matrices are


@pytree
class Identity:
    """No rotation."""

    dim: int = static()

    def rotate(self, x: Float[Array, "*batch dim"], /) -> Float[Array, "*batch dim"]:
        """Return `x`."""
        return x

    def unrotate(self, y: Float[Array, "*batch dim"], /) -> Float[Array, "*batch dim"]:
        """Return `y`."""
        return y


@pytree
class Dense:
    """Any orthogonal matrix; row i holds the direction of coordinate i."""

    matrix: Float[Array, "dim dim"]

    @property
    def dim(self) -> int:
        """Length of the vectors."""
        return self.matrix.shape[-1]

    def rotate(self, x: Float[Array, "*batch dim"], /) -> Float[Array, "*batch dim"]:
        """Multiply by the matrix."""
        return _product(x, self.matrix.mT)

    def unrotate(self, y: Float[Array, "*batch dim"], /) -> Float[Array, "*batch dim"]:
        """Multiply by the transposed matrix."""
        return _product(y, self.matrix)


@pytree
class Hadamard:
    """Rounds of random signs and a fast orthogonal transform: `y = (H D_r) ... (H D_1) x`, O(dim log dim).

    H is the Sylvester-Hadamard matrix over sqrt(dim) where dim is a power of two; otherwise its Kronecker product with
    the Hartley matrix of dim's odd part. Both are symmetric and their own inverse, so nothing is stored but the signs.
    """

    signs: Int8[Array, "rounds dim"]

    @property
    def dim(self) -> int:
        """Length of the vectors."""
        return self.signs.shape[-1]

    def rotate(self, x: Float[Array, "*batch dim"], /) -> Float[Array, "*batch dim"]:
        """Apply the rounds."""
        y = x.astype(jnp.float32)
        for signs in self.signs:
            y = hadamard_transform(y * signs.astype(jnp.float32))
        return y.astype(x.dtype)

    def unrotate(self, y: Float[Array, "*batch dim"], /) -> Float[Array, "*batch dim"]:
        """Apply the rounds backwards."""
        x = y.astype(jnp.float32)
        for signs in self.signs[::-1]:
            x = hadamard_transform(x) * signs.astype(jnp.float32)
        return x.astype(y.dtype)


@pytree
class Rotor:
    """Independent rotations of consecutive triples by unit quaternions (w, x, y, z); a tail of dim % 3 stays as it is.

    An ablation, not a recommendation: a triple that holds an outlier keeps all of its energy, so on inputs with
    outlier channels or heavy tails the error is several times that of `Dense` or `Hadamard`.
    """

    quaternions: Float[Array, "triples 4"]
    dim: int = static()

    def rotate(self, x: Float[Array, "*batch dim"], /) -> Float[Array, "*batch dim"]:
        """Rotate each triple."""
        return self._turn(x, self._matrices())

    def unrotate(self, y: Float[Array, "*batch dim"], /) -> Float[Array, "*batch dim"]:
        """Rotate each triple back."""
        return self._turn(y, self._matrices().mT)

    def _turn(self, x: Float[Array, "*batch dim"], matrices: Float[Array, "triples 3 3"]) -> Float[Array, "*batch dim"]:
        split = 3 * matrices.shape[0]
        triples = x[..., :split].astype(jnp.float32).reshape(*x.shape[:-1], -1, 3)
        turned = jnp.einsum("gij,...gj->...gi", matrices, triples, precision="highest")
        return jnp.concatenate([turned.reshape(*x.shape[:-1], split).astype(x.dtype), x[..., split:]], axis=-1)

    def _matrices(self) -> Float[Array, "triples 3 3"]:
        w, x, y, z = jnp.moveaxis(self.quaternions, -1, 0)
        rows = [
            [w * w + x * x - y * y - z * z, 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), w * w - x * x + y * y - z * z, 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), w * w - x * x - y * y + z * z],
        ]
        return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)


def haar(key: PRNGKeyArray, dim: int) -> Dense:
    """Draw a rotation uniformly from O(dim).

    The QR decomposition of a Gaussian matrix, with the signs of R's diagonal moved into Q: without them the result is
    not uniform.

    Raises:
        ValueError: `dim` is not positive.

    Example:
        >>> rotation = haar(jax.random.key(0), 64)
        >>> x = jnp.ones(64)
        >>> bool(jnp.allclose(rotation.unrotate(rotation.rotate(x)), x, atol=1e-5))
        True

    References:
        F. Mezzadri, "How to generate random matrices from the classical compact groups", arXiv:math-ph/0609050, s. 5.
    """
    if dim < 1:
        raise ValueError(f"dim must be positive, got {dim}")
    q, r = jnp.linalg.qr(jax.random.normal(key, (dim, dim), jnp.float32))
    return Dense(matrix=q * jnp.where(jnp.diagonal(r) < 0, -1.0, 1.0))


def hadamard(key: PRNGKeyArray, dim: int, *, rounds: int = 1) -> Hadamard:
    """Draw the signs of a randomized Hadamard transform.

    One round makes coordinates of structured vectors bounded, which a codebook likes, but of one magnitude where the
    vector is one-hot: with a scale that corrects the length this is the best case, without one the worst. More rounds
    bring every vector closer to a normal distribution; two still leave a one-hot vector a single random diagonal. The
    documentation's table of rotations has the numbers behind the defaults of `methods.turboquant`.

    Raises:
        ValueError: `dim` is odd or not positive, or `rounds` is not positive.

    Example:
        >>> rotation = hadamard(jax.random.key(0), 96)
        >>> rotation.rotate(jnp.ones((5, 96), jnp.bfloat16)).dtype
        dtype(bfloat16)

    References:
        N. Ailon, B. Chazelle, "The fast Johnson-Lindenstrauss transform and approximate nearest neighbors", SIAM J.
        Comput. 39 (2009), s. 2.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"dim must be even and positive for a Hadamard rotation, got {dim}; haar takes any dim")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    return Hadamard(signs=jax.random.rademacher(key, (rounds, dim), jnp.int8))


def rotor(key: PRNGKeyArray, dim: int) -> Rotor:
    """Draw a uniform rotation for each triple of coordinates.

    Raises:
        ValueError: `dim` is less than 3.

    Example:
        >>> rotor(jax.random.key(0), 128).quaternions.shape
        (42, 4)
    """
    if dim < 3:
        raise ValueError(f"dim must be at least 3 for a rotor, got {dim}")
    quaternions = jax.random.normal(key, (dim // 3, 4), jnp.float32)
    return Rotor(quaternions=quaternions / jnp.linalg.norm(quaternions, axis=-1, keepdims=True), dim=dim)


def hadamard_transform(x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
    """Multiply by the symmetric orthogonal matrix `Hadamard` uses (any dim; flat for powers of two).

    Example:
        >>> hadamard_transform(jnp.array([1.0, 0.0, 0.0, 0.0]))
        Array([0.5, 0.5, 0.5, 0.5], dtype=float32)
    """
    dim = x.shape[-1]
    factors = _factors(dim)
    y = x.reshape(*x.shape[:-1], *factors)
    for axis, size in enumerate(factors, start=-len(factors)):
        y = jnp.moveaxis(_product(jnp.moveaxis(y, axis, -1), _symmetric(size)), -1, axis)
    return y.reshape(x.shape)


def _product(x: Float[Array, "*batch n"], matrix: Float[Array | np.ndarray, "n m"]) -> Float[Array, "*batch m"]:
    y = jnp.matmul(x.astype(jnp.float32), jnp.asarray(matrix, jnp.float32), precision="highest")
    return y.astype(x.dtype)


def _factors(dim: int) -> tuple[int, ...]:
    """Split dim into an odd factor and powers of two that are cheap to multiply by."""
    power = dim & -dim
    factors = [] if dim == power else [dim // power]
    while power > _LARGEST_FACTOR:
        factors.append(16)
        power //= 16
    return (*factors, power) if power > 1 or not factors else tuple(factors)


@functools.cache
def _symmetric(size: int) -> np.ndarray:
    """Give the Sylvester-Hadamard matrix for powers of two, the Hartley matrix otherwise; both over sqrt(size)."""
    index = np.arange(size)
    if size & (size - 1) == 0:
        parity = np.bitwise_count(index[:, None] & index) & 1
        return ((1.0 - 2.0 * parity) / np.sqrt(size)).astype(np.float32)
    angle = 2 * np.pi * (index[:, None] * index % size) / size
    return ((np.cos(angle) + np.sin(angle)) / np.sqrt(size)).astype(np.float32)
