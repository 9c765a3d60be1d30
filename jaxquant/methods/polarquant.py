"""PolarQuant: vectors in polar coordinates, pair by pair; angles are coded, and one radius a block is kept.

After a random rotation, coordinates are paired into radii and angles, radii are paired again, and so on for `levels`
rounds. The angle of the first round is uniform on the circle; those of round l have on [0, pi/2] the density
sin(2 t)**(2**(l - 1) - 1), whatever the vector was, so that codebooks need no data and no range has to be stored. A
decoded block has the length of the block: with c_l = E cos(angle - decoded angle), the squared error is
2 (1 - c_1 c_2 ... c_levels) of the squared length.

References:
    I. Han, P. Kacham, A. Karbasi, V. Mirrokni, A. Zandieh, "PolarQuant: Quantizing KV caches with polar
    transformation", arXiv:2502.02617, algorithm 1, lemma 2 (the densities), s. 4.1 (4, 2, 2 and 2 bits, blocks of 16).

Differs from the paper: levels of angles maximize E cos(error), which is what the squared error of the vector depends
on, instead of minimizing the error of the angle; unless `paper` is called, blocks are the largest power of two that
divides dim, and bits go to the round where one more raises log c_l most; the rotation is a randomized Hadamard
transform.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from jaxquant import packing, quantizers, rotations
from jaxquant._pytree import pytree, static
from jaxquant.protocols import Rotation

_GRID = 2**14  # points on which densities of angles are summed up
_MOST_BITS = 6


@pytree
class Polar:
    """Angles of recursive pairs, and the radius of each block.

    Attributes:
        rotation: applied first.
        angles: for each round, the levels of its angle in increasing order, in radians.
        widths: bits of an angle in each round.
        scale_dtype: of the radii.
    """

    rotation: Rotation
    angles: tuple[Float[Array, " levels"], ...]
    widths: tuple[int, ...] = static()
    scale_dtype: quantizers.ScaleDtype = static(default="float16")

    @property
    def dim(self) -> int:
        """Length of the vectors."""
        return self.rotation.dim

    def quantize(self, x: Float[Array, "*batch dim"], /) -> quantizers.Quantized:
        """Code vectors."""
        norm, unit = quantizers.split_norm(jnp.nan_to_num(x.astype(jnp.float32)))
        radius, codes = self.rotation.rotate(unit), []
        for i, levels in enumerate(self.angles):
            angle = jnp.arctan2(radius[..., 1::2], radius[..., ::2])
            if not i:  # around the circle: the cell of the last level goes on at the first
                angle = jnp.where(angle < _middle(levels[-1] - 2 * math.pi, levels[0]), angle + 2 * math.pi, angle)
                angle = jnp.where(angle > _middle(levels[-1], levels[0] + 2 * math.pi), angle - 2 * math.pi, angle)
            beyond = angle[..., None] > _middle(levels[1:], levels[:-1])
            codes.append(jnp.sum(beyond, axis=-1, dtype=jnp.uint8))
            radius = jnp.hypot(radius[..., ::2], radius[..., 1::2])
        scales = quantizers.rounded(radius * norm[..., None], self.scale_dtype)
        return quantizers.Quantized(codes=self._pack(codes), scales=scales)

    def expand(self, code: quantizers.Quantized, /) -> Float[Array, "*batch dim"]:
        """Turn angles and radii into coordinates, from the last round to the first."""
        assert code.scales is not None
        x = code.scales.astype(jnp.float32)
        for levels, codes in zip(self.angles[::-1], self._unpack(code.codes)[::-1], strict=True):
            angle = jnp.take(levels, codes, mode="clip")
            x = jnp.stack([x * jnp.cos(angle), x * jnp.sin(angle)], axis=-1).reshape(*x.shape[:-1], -1)
        return x

    def restore(self, y: Float[Array, "*batch dim"], /) -> Float[Array, "*batch dim"]:
        """Rotate back."""
        return self.rotation.unrotate(y)

    def project(self, q: Float[Array, "*batch dim"], /) -> Float[Array, "*batch dim"]:
        """Rotate."""
        return self.rotation.rotate(q.astype(jnp.float32))

    def _pack(self, codes: list[Array]) -> UInt8[Array, "*batch n_bytes"]:
        parts = [
            packing.pack(jnp.concatenate([codes[i] for i in rounds], axis=-1), bits=width)
            for width, rounds in _runs(self.widths).items()
        ]
        return jnp.concatenate(parts, axis=-1)

    def _unpack(self, packed: UInt8[Array, "*batch n_bytes"]) -> list[UInt8[Array, "*batch codes"]]:
        codes: dict[int, Array] = {}
        for width, rounds in _runs(self.widths).items():
            counts = [self.dim >> (i + 1) for i in rounds]
            size = packing.packed_size(sum(counts), bits=width)
            both = packing.unpack(packed[..., :size], bits=width, length=sum(counts))
            packed = packed[..., size:]
            codes |= dict(zip(rounds, jnp.split(both, np.cumsum(counts)[:-1].tolist(), axis=-1), strict=True))
        return [codes[i] for i in range(len(self.widths))]


def polar(key: PRNGKeyArray, *, dim: int, bits: int) -> Polar:
    """Build a quantizer with at most `bits` bits a coordinate, radii not counted, shared out over the rounds.

    Args:
        key: of the rotation.
        dim: of the vectors; even.
        bits: a coordinate, 2 to 6.

    Raises:
        ValueError: `dim` is odd, or `bits` is not in 2..6.

    Example:
        >>> quantizer = polar(jax.random.key(0), dim=128, bits=2)
        >>> quantizer.widths
        (3, 1, 1, 1, 1, 1, 1)
        >>> quantizers.quantize(quantizer, jnp.ones(128)).nbytes
        34
    """
    if bits not in range(2, _MOST_BITS + 1):
        raise ValueError(f"bits must be an integer from 2 to {_MOST_BITS}, got {bits!r}")
    return build(key, dim=dim, widths=shared_out(dim, bits))


def paper(key: PRNGKeyArray, *, dim: int) -> Polar:
    """Build the paper's quantizer: blocks of 16, angles of 4, 2, 2 and 2 bits, 3.875 bits a coordinate in all.

    Raises:
        ValueError: `dim` is not a multiple of 16.

    Example:
        >>> quantizers.quantize(paper(jax.random.key(0), dim=128), jnp.ones(128)).nbytes * 8 / 128
        3.875
    """
    return build(key, dim=dim, widths=(4, 2, 2, 2))


def build(key: PRNGKeyArray, *, dim: int, widths: tuple[int, ...]) -> Polar:
    """Build a quantizer with a width for the angles of each round, and one radius for each 2**rounds coordinates.

    Raises:
        ValueError: `dim` is not a multiple of 2**rounds, or a width is not in 1..8.
    """
    if not widths or dim % 2 ** len(widths) or not all(1 <= width <= 8 for width in widths):
        raise ValueError(f"widths must be from 1 to 8, for rounds whose 2**rounds divides {dim}, got {widths}")
    angles = tuple(jnp.asarray(levels(i + 1, width)[0], jnp.float32) for i, width in enumerate(widths))
    return Polar(rotation=rotations.hadamard(key, dim, rounds=3), angles=angles, widths=tuple(widths))


@functools.cache
def levels(number: int, bits: int) -> tuple[np.ndarray, float]:
    """Solve for the angles of one round: those of greatest E cos(angle - level).

    Args:
        number: of the round, from 1.
        bits: of a code.

    Returns:
        The levels, in radians, and E cos(angle - level).

    Example:
        >>> found, cosine = levels(1, 2)
        >>> round(cosine, 6), round(2 * 2**0.5 / math.pi, 6)
        (0.900316, 0.900316)
    """
    count = 2**bits
    if number == 1:
        return (np.arange(count) + 0.5) * 2 * math.pi / count - math.pi, count / math.pi * math.sin(math.pi / count)
    point = (np.arange(_GRID) + 0.5) * math.pi / 2 / _GRID
    density = np.exp((2.0 ** (number - 1) - 1) * np.log(np.sin(2 * point)))
    density /= density.sum()
    sums = [np.append(0.0, np.cumsum(density * part)) for part in (np.cos(point), np.sin(point))]
    edges, mass = np.linspace(0, math.pi / 2, _GRID + 1), np.append(0.0, np.cumsum(density))
    found = np.interp((np.arange(count) + 0.5) / count, mass, edges)
    cosine = 0.0
    for _ in range(2000):
        ends = np.concatenate([[0.0], (found[1:] + found[:-1]) / 2, [math.pi / 2]])
        x, y = (np.diff(np.interp(ends, edges, part)) for part in sums)
        found, before, cosine = np.arctan2(y, x), cosine, float(np.sum(np.hypot(x, y)))
        if cosine - before < 1e-12:
            break
    return found, cosine


def shared_out(dim: int, bits: int) -> tuple[int, ...]:
    """Share `bits * dim` bits out over the angles of all rounds, bit by bit where log E cos rises most for its cost.

    Raises:
        ValueError: `dim` is odd.

    Example:
        >>> shared_out(64, 3)
        (4, 2, 2, 2, 2, 2)
    """
    rounds = (dim & -dim).bit_length() - 1
    if not rounds:
        raise ValueError(f"dim must be even, got {dim}")
    widths, best = [1] * rounds, 0
    while best is not None:
        wider = [[width + (i == j) for j, width in enumerate(widths)] for i in range(rounds)]
        gains = {
            i: math.log(levels(i + 1, widths[i] + 1)[1] / levels(i + 1, widths[i])[1]) * 2**i
            for i in range(rounds)
            if widths[i] < 8 and 8 * _size(dim, wider[i]) <= bits * dim
        }
        best = max(gains, key=lambda i: gains[i], default=None)
        widths = widths if best is None else wider[best]
    return tuple(widths)


def kv(key: PRNGKeyArray, *, dim: int, bits_k: int, bits_v: int) -> tuple[Polar, Polar]:
    """Build the pair of quantizers for a cache.

    Example:
        >>> keys, values = kv(jax.random.key(0), dim=64, bits_k=4, bits_v=2)
        >>> keys.widths, values.widths
        ((5, 3, 3, 3, 4, 3), (3, 1, 1, 1, 1, 1))
    """
    first, second = jax.random.split(key)
    return polar(first, dim=dim, bits=bits_k), polar(second, dim=dim, bits=bits_v)


def _runs(widths: Sequence[int]) -> dict[int, list[int]]:
    """Give the rounds of each width: their codes are packed together, so that short rounds waste no bits."""
    return {width: [i for i, w in enumerate(widths) if w == width] for width in sorted(set(widths))}


def _size(dim: int, widths: Sequence[int]) -> int:
    """Give the bytes that angles take."""
    runs = _runs(widths).items()
    return sum(packing.packed_size(sum(dim >> (i + 1) for i in rounds), bits=width) for width, rounds in runs)


def _middle(a: Array, b: Array) -> Array:
    return (a + b) / 2


EXAMPLES = (lambda: polar(jax.random.key(0), dim=64, bits=3), lambda: paper(jax.random.key(0), dim=64))
