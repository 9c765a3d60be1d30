"""Unbiased codes for gradients: groups of neighbouring numbers between their extremes, rounded at random.

A number between two levels becomes the upper one with the probability that keeps its mean, so whatever is linear in the
decoded numbers is right on average. The stored offset and step are rounded outwards, so that no number lies beyond its
outermost level, where rounding could not be fair.

References:
    J. Chen, L. Zheng, Z. Yao, D. Wang, I. Stoica, M. W. Mahoney, J. E. Gonzalez, "ActNN: Reducing training memory
    footprint via 2-bit activation compressed training", arXiv:2104.14129, section 3.2 (per-group quantization).

Differs from the paper: one width for all groups; offset and step in bfloat16, rounded outwards.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Integer, PRNGKeyArray, UInt8, UInt16

from jaxquant import packing
from jaxquant._pytree import pytree, static


@pytree
class Grouped:
    """Codes of groups of numbers; the packed bytes are the only copy.

    Numbers are held as the bits of bfloat16: a CPU would widen a stack of bfloat16 to float32.

    Attributes:
        codes: packed codes, `ceil(dim * bits / 8)` bytes a vector.
        offsets: lowest level of every group.
        steps: distance of its levels.
    """

    codes: UInt8[Array, "*batch n_bytes"]
    offsets: UInt16[Array, "*batch groups"]
    steps: UInt16[Array, "*batch groups"]

    @property
    def nbytes(self) -> int:
        """Bytes held, everything included."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


@pytree
class Stochastic:
    """A `protocols.Quantizer` with E[dequantize(quantize(x))] = x over its key; `fold_in` gives another one.

    An error is less than one step, range / (2**bits - 1) of its group, and its variance at most a quarter of the
    step's square. NaN counts as 0 and infinities as the largest finite value.

    Attributes:
        key: of the rounding; None rounds to the nearest level, with a bias and half the largest error.
        dim: length of the vectors.
        bits: a number.
        group: numbers that share an offset and a step; the last group of a vector may be shorter.

    Example:
        >>> quantizer = Stochastic(key=jax.random.key(0), dim=256, bits=2)
        >>> quantizer.quantize(jnp.ones((10, 256))).nbytes  # 64 bytes of codes, 4 groups of 4 bytes
        800
    """

    key: PRNGKeyArray | None
    dim: int = static()
    bits: int = static()
    group: int = static(default=64)

    def quantize(self, x: Float[Array, "*batch dim"], /) -> Grouped:
        """Code vectors."""
        x = jnp.nan_to_num(x.astype(jnp.float32))
        x = jnp.clip(x, -(2.0**125), 2.0**125)  # the range of a group, and a step more, must be finite
        parts = self._grouped(x)
        low, high = jnp.min(parts, axis=-1), jnp.max(parts, axis=-1)
        offsets = _outwards(low, -jnp.inf)
        base = _number(offsets)
        steps = _outwards((high - base) / (2**self.bits - 1), jnp.inf)
        step = _number(steps)
        place = (parts - base[..., None]) / jnp.where(step > 0, step, 1.0)[..., None]
        place = place.reshape(*place.shape[:-2], -1)[..., : self.dim]
        if self.key is None:
            codes = jnp.floor(place + 0.5)
        else:
            codes = jnp.floor(place + jax.random.uniform(self.key, place.shape))
        codes = jnp.clip(codes, 0, 2**self.bits - 1).astype(jnp.uint8)
        return Grouped(codes=packing.pack(codes, bits=self.bits), offsets=offsets, steps=steps)

    def expand(self, code: Grouped, /) -> Float[Array, "*batch dim"]:
        """Look codes up."""
        codes = packing.unpack(code.codes, bits=self.bits, length=self.dim).astype(jnp.float32)
        offsets, steps = (self._each(_number(x)) for x in (code.offsets, code.steps))
        return offsets + steps * codes

    def restore(self, y: Float[Array, "*batch dim"], /) -> Float[Array, "*batch dim"]:
        """Return `y`."""
        return y

    def project(self, q: Float[Array, "*batch dim"], /) -> Float[Array, "*batch dim"]:
        """Cast to float32."""
        return q.astype(jnp.float32)

    def _grouped(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch groups group"]:
        """Split vectors; a short last group is filled with copies of its last number, which change no extreme."""
        missing = -self.dim % self.group
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)], mode="edge")
        return x.reshape(*x.shape[:-1], -1, self.group)

    def _each(self, x: Float[Array, "*batch groups"]) -> Float[Array, "*batch dim"]:
        return jnp.repeat(x, self.group, axis=-1)[..., : self.dim]


def fold_in(quantizer: Stochastic, tag: int | Integer[Array, ""]) -> Stochastic:
    """Give the same quantizer with another key, for another layer or step.

    Example:
        >>> first = Stochastic(key=jax.random.key(0), dim=8, bits=2)
        >>> bool(fold_in(first, 3).key == first.key)
        False
    """
    if quantizer.key is None:
        return quantizer
    return dataclasses.replace(quantizer, key=jax.random.fold_in(quantizer.key, tag))


def _outwards(x: Float[Array, "*batch"], towards: float) -> UInt16[Array, "*batch"]:
    """Round to bfloat16, upwards or downwards."""
    near = x.astype(jnp.bfloat16)
    back = near.astype(jnp.float32)
    wrong = back < x if towards > 0 else back > x
    near = jnp.where(wrong, jnp.nextafter(near, jnp.full_like(near, towards)), near)
    return lax.bitcast_convert_type(near, jnp.uint16)


def _number(bits: UInt16[Array, "*batch"]) -> Float[Array, "*batch"]:
    return lax.bitcast_convert_type(bits, jnp.bfloat16).astype(jnp.float32)
