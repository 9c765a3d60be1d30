"""Tiers by bit planes: every token keeps the high bits of its code, the best-scored tokens the low ones too.

A code of b bits is an index of ordered levels. Its upper bits alone say which run of levels the coordinate fell into,
and decode to the mean of that run under the density. All tokens store those; a table of static size holds the lower
bits of the tokens of the highest scores. When a better token comes, the lower bits of the worst are dropped: nothing is
coded twice and nothing is kept in two forms.

References:
    No paper. The successive refinement of W. H. R. Equitz, T. M. Cover, "Successive refinement of information", IEEE
    Trans. Inf. Theory 37 (1991), with the scalar codes of TurboQuant (A. Zandieh et al., arXiv:2504.19874).

Differs from tqai, whose tiers are of whole tensors and, through its caches, all of one quality: these are per token.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, UInt8

from jaxquant import packing, strategies
from jaxquant._pytree import pytree, static
from jaxquant.methods import h2o, turboquant
from jaxquant.pipeline import Pipeline
from jaxquant.protocols import Held, Scorer
from jaxquant.quantizers import Quantized, Scalar
from jaxquant.strategies import Appended, Kept


@pytree
class Planes:
    """A scalar code in two parts.

    Attributes:
        high: upper bits and scales.
        low: the remaining bits.
    """

    high: Quantized
    low: UInt8[Array, "*batch n_bytes"]

    @property
    def nbytes(self) -> int:
        """Bytes held, everything included."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


@pytree
class Nested:
    """A scalar quantizer whose codes are stored as upper and lower bits.

    Attributes:
        scalar: of all bits.
        coarse: levels that the upper bits decode to alone.
        base: upper bits of a code.
    """

    scalar: Scalar
    coarse: Float[Array, " runs"]
    base: int = static()

    @property
    def dim(self) -> int:
        """Length of the vectors."""
        return self.scalar.dim

    def quantize(self, x: Float[Array, "*batch dim"], /) -> Planes:
        """Code vectors, and split the codes."""
        code = self.scalar.quantize(x)
        stored = packing.unpack(code.codes, bits=self.scalar.bits, length=self.dim)
        index = self.scalar._stored(stored, inverse=True)
        rest = self.scalar.bits - self.base
        high, low = index >> np.uint8(rest), index & np.uint8(2**rest - 1)
        return Planes(
            high=Quantized(codes=packing.pack(high, bits=self.base), scales=code.scales),
            low=packing.pack(low, bits=rest),
        )

    def expand(self, code: Planes, /) -> Float[Array, "*batch dim"]:
        """Look up all bits, and scale."""
        return self.refined(code.high, code.low, jnp.ones(code.low.shape[:-1], bool))

    def refined(
        self, high: Quantized, low: UInt8[Array, "*batch n_bytes"], has: Bool[Array, "*batch"], /
    ) -> Float[Array, "*batch dim"]:
        """Look up all bits of the vectors that have them, the upper bits of the others, and scale."""
        assert high.scales is not None
        rest = self.scalar.bits - self.base
        upper = packing.unpack(high.codes, bits=self.base, length=self.dim)
        index = (upper << np.uint8(rest)) | packing.unpack(low, bits=rest, length=self.dim)
        fine = jnp.take(self.scalar.codebook.centroids, index, mode="clip")
        levels = jnp.where(has[..., None], fine, jnp.take(self.coarse, upper, mode="clip"))
        return levels * (high.scales.astype(jnp.float32) * self.dim**-0.5)[..., None]

    def restore(self, y: Float[Array, "*batch dim"], /) -> Float[Array, "*batch dim"]:
        """Rotate back."""
        return self.scalar.restore(y)

    def project(self, q: Float[Array, "*batch dim"], /) -> Float[Array, "*batch dim"]:
        """Rotate."""
        return self.scalar.project(q)


@pytree
class Tiers:
    """Storage: the upper bits of all tokens and the lower bits of some.

    Attributes:
        base: upper bits of keys and values, appended.
        fine: lower bits of the best tokens.
    """

    base: Appended
    fine: Kept


@pytree
class Tiered:
    """Give lower bits to the tokens of the highest scores that reach the threshold.

    Attributes:
        share: of the capacity that there is room for in the upper tier.
    """

    share: float = static(default=0.25)

    def init(self, quantizers: strategies.Pair, /, *, batch: int, kv_heads: int, capacity: int, block: int) -> Tiers:
        """Allocate."""
        if not all(isinstance(quantizer, Nested) for quantizer in quantizers):
            raise TypeError(f"Tiered needs quantizers of type tiered.Nested, got {quantizers}")
        keys, values = strategies.empty(quantizers, batch, kv_heads, capacity)
        slots = max(1, round(self.share * capacity))
        nothing = jnp.zeros(batch, jnp.int32)
        return Tiers(
            base=Appended(codes=(keys.high, values.high), tokens=nothing, start=nothing),
            fine=Kept(
                codes=(keys.low[:, :, :slots], values.low[:, :, :slots]),
                position=jnp.full((batch, kv_heads, slots), -1, jnp.int32),
                score=jnp.zeros((batch, kv_heads, slots), jnp.float32),
            ),
        )

    def store(self, state: Tiers, quantizers: strategies.Pair, k, v, scores, step, threshold, /) -> Tiers:
        """Append the upper bits, and let the lower ones compete."""
        if scores is None:
            raise ValueError("Tiered needs a scorer: without scores there is no telling which tokens to refine")
        keys, values = strategies.coded(quantizers, k, v)
        base = Appended(
            codes=strategies.append(state.base.codes, (keys.high, values.high), state.base.tokens // k.shape[2]),
            tokens=state.base.tokens + k.shape[2],
            start=jnp.where(state.base.tokens == 0, step, state.base.start),
        )
        new = Kept(codes=(keys.low, values.low), position=strategies.run(step, scores.shape), score=scores)
        return Tiers(base=base, fine=strategies.best(state.fine, new, threshold))

    def read(self, state: Tiers, quantizers: strategies.Pair, queries: Array, /) -> Held:
        """Decode every token with the bits it has."""
        base, fine = state.base, state.fine
        tokens = base.codes[0].codes.shape[2]
        lead = fine.position.shape[:2]
        slot = jnp.where(fine.position >= 0, fine.position - base.start[:, None, None], tokens)
        row, head = jnp.ogrid[: lead[0], : lead[1]]
        place = (row[..., None], head[..., None], slot)
        has = jnp.zeros((*lead, tokens), bool).at[place].set(True, mode="drop")
        score = jnp.zeros((*lead, tokens), jnp.float32).at[place].set(fine.score, mode="drop")

        def decoded(quantizer: Nested, high: Quantized, low: Array) -> Array:
            dense = jnp.zeros((*lead, tokens, low.shape[-1]), jnp.uint8).at[place].set(low, mode="drop")
            return quantizer.restore(quantizer.refined(high, dense, has))

        k, v = (
            decoded(quantizer, high, low)  # pyright: ignore[reportArgumentType]
            for quantizer, high, low in zip(quantizers, base.codes, fine.codes, strict=True)
        )
        return Held(k=k, v=v, position=strategies.positions(base, tokens), score=score)

    def rescore(self, state: Tiers, scores: Float[Array, "batch kv_heads tokens"], /) -> Tiers:
        """Replace the scores of the tokens in the upper tier; the others are not in the race any more."""
        slot = jnp.maximum(state.fine.position - state.base.start[:, None, None], 0)
        score = jnp.take_along_axis(scores, slot, axis=2, mode="clip")
        fine = Kept(codes=state.fine.codes, position=state.fine.position, score=score)
        return Tiers(base=state.base, fine=fine)


def nested(scalar: Scalar, *, base: int) -> Nested:
    """Split a scalar quantizer; what the upper bits decode to keeps what the scale of the quantizer keeps.

    Args:
        scalar: of all bits, its scale one of "norm", "preserve" and "unbiased".
        base: upper bits, fewer than all.

    Raises:
        ValueError: `base` is out of range.

    Example:
        >>> full = turboquant.mse(jax.random.key(0), dim=64, bits=4)
        >>> [round(float(level), 2) for level in nested(full, base=1).coarse]
        [-0.8, 0.8]
    """
    if not 1 <= base < scalar.bits:
        raise ValueError(f"base must be from 1 to bits - 1 = {scalar.bits - 1}, got {base}")
    fine = np.asarray(scalar.codebook.centroids, np.float64).reshape(2**base, -1)
    edges = np.concatenate([[-np.inf], (fine.ravel()[1:] + fine.ravel()[:-1]) / 2, [np.inf]])
    below = np.array([_normal(edge) for edge in edges])
    mass = np.diff(below).reshape(fine.shape)
    coarse = np.sum(mass * fine, axis=1) / np.sum(mass, axis=1)
    share = np.sum(mass, axis=1)
    # The stored scale makes the fine levels right; the coarse ones are shorter, and more so than the fine ones.
    energies = np.sum(mass * fine**2), np.sum(share * coarse**2)
    factor = {"preserve": (energies[0] / energies[1]) ** 0.5, "unbiased": energies[0] / energies[1]}
    return Nested(scalar=scalar, coarse=jnp.asarray(coarse * factor.get(scalar.scale, 1.0), jnp.float32), base=base)


def _normal(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def pipeline(
    key: PRNGKeyArray,
    *,
    dim: int,
    bits_k: int,
    bits_v: int,
    base: int = 2,
    share: float = 0.25,
    scorer: Scorer | None = None,
    block: int = 32,
) -> Pipeline:
    """Build a pipeline of two tiers.

    Args:
        key: of the rotations.
        dim: of the vectors.
        bits_k: a coordinate of keys in the upper tier.
        bits_v: a coordinate of values in the upper tier.
        base: bits of every token, at most one less than those of the upper tier.
        share: of the capacity that the upper tier has room for.
        scorer: accumulated attention if None.
        block: tokens that are judged together.

    Example:
        >>> pipeline(jax.random.key(0), dim=64, bits_k=4, bits_v=4).keys.base
        2
    """
    keys, values = turboquant.kv(key, dim=dim, bits_k=bits_k, bits_v=bits_v)
    return Pipeline(
        keys=nested(keys, base=min(base, bits_k - 1)),
        values=nested(values, base=min(base, bits_v - 1)),
        strategy=Tiered(share=share),
        scorer=h2o.Mass(decay=jnp.float32(1.0)) if scorer is None else scorer,
        block=block,
    )


EXAMPLES = (lambda: pipeline(jax.random.key(0), dim=64, bits_k=4, bits_v=4, block=4),)
