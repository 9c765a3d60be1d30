"""KIVI: keys per channel, values per token, both affine in small groups, and the newest tokens exact.

A few channels of keys are large in every token, so each channel gets its own scale and offset over a group of tokens;
values have no such channels, and each token gets its own over groups of channels:

    x ~ offset + step * code,   offset = min x,   step = (max x - min x) / (2^bits - 1).

The tokens that do not yet fill a group, and the cache's `window`, are the paper's full-precision residual.

References:
    Z. Liu, J. Yuan, H. Jin, S. Zhong, Z. Xu, V. Braverman, B. Chen, X. Hu, "KIVI: A tuning-free asymmetric 2bit
    quantization for KV cache", arXiv:2402.02750, section 3 and algorithm 1.

Differs from the paper: groups leave the residual one at a time, keys and values together, so that it holds from
`window` to `window + group` tokens, where the paper empties all of it once it is full and always keeps the same number
of values.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float16, PRNGKeyArray, UInt8

from jaxquant import packing
from jaxquant._pytree import pytree, static
from jaxquant.pipeline import Pipeline

_LARGEST = 65504.0  # of float16


@pytree
class Affine:
    """Integers with a step and an offset for each group.

    Attributes:
        codes: packed along the channels.
        step: of each group.
        offset: likewise.
    """

    codes: UInt8[Array, "*batch tokens n_bytes"]
    step: Float16[Array, "*batch groups channels"]
    offset: Float16[Array, "*batch groups channels"]

    @property
    def nbytes(self) -> int:
        """Bytes held, everything included."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


@pytree
class PerToken:
    """Every token by itself, in groups of `group` channels."""

    dim: int = static()
    bits: int = static()
    group: int = static(default=32)

    def quantize(self, x: Float[Array, "*batch dim"], /) -> Affine:
        """Code vectors."""
        grouped = x.reshape(*x.shape[:-1], self.dim // self.group, self.group)
        codes, step, offset = _coded(grouped, -1, self.bits)
        codes = packing.pack(codes.reshape(x.shape), bits=self.bits)
        return Affine(codes=codes, step=step[..., 0], offset=offset[..., 0])

    def expand(self, code: Affine, /) -> Float[Array, "*batch dim"]:
        """Scale and shift."""
        integers = packing.unpack(code.codes, bits=self.bits, length=self.dim).astype(jnp.float32)
        step, offset = (jnp.repeat(x.astype(jnp.float32), self.group, axis=-1) for x in (code.step, code.offset))
        return integers * step + offset

    def restore(self, y: Float[Array, "*batch dim"], /) -> Float[Array, "*batch dim"]:
        """Return `y`."""
        return y

    def project(self, q: Float[Array, "*batch dim"], /) -> Float[Array, "*batch dim"]:
        """Cast to float32."""
        return q.astype(jnp.float32)


@pytree
class PerChannel:
    """The tokens of a block together, every channel by itself: for the keys of a pipeline whose block is the group."""

    dim: int = static()
    bits: int = static()

    def quantize(self, x: Float[Array, "*batch tokens dim"], /) -> Affine:
        """Code a block."""
        codes, step, offset = _coded(x, -2, self.bits)
        return Affine(codes=packing.pack(codes, bits=self.bits), step=step, offset=offset)

    def expand(self, code: Affine, /) -> Float[Array, "*batch tokens dim"]:
        """Scale and shift blocks that were put behind each other."""
        integers = packing.unpack(code.codes, bits=self.bits, length=self.dim).astype(jnp.float32)
        group = integers.shape[-2] // code.step.shape[-2]
        step, offset = (jnp.repeat(x.astype(jnp.float32), group, axis=-2) for x in (code.step, code.offset))
        return integers * step + offset

    def restore(self, y: Float[Array, "*batch tokens dim"], /) -> Float[Array, "*batch tokens dim"]:
        """Return `y`."""
        return y

    def project(self, q: Float[Array, "*batch dim"], /) -> Float[Array, "*batch dim"]:
        """Cast to float32."""
        return q.astype(jnp.float32)


def _coded(x: Array, axis: int, bits: int) -> tuple[UInt8[Array, "..."], Float16[Array, "..."], Float16[Array, "..."]]:
    x = jnp.clip(jnp.nan_to_num(x.astype(jnp.float32)), -_LARGEST / 2, _LARGEST / 2)
    offset = jnp.min(x, axis=axis, keepdims=True).astype(jnp.float16)
    span = jnp.max(x, axis=axis, keepdims=True) - offset.astype(jnp.float32)
    step = (span / (2**bits - 1)).astype(jnp.float16)
    unit = jnp.where(step > 0, step.astype(jnp.float32), 1.0)
    codes = jnp.clip(jnp.round((x - offset.astype(jnp.float32)) / unit), 0, 2**bits - 1)
    return codes.astype(jnp.uint8), step, offset


def pipeline(key: PRNGKeyArray, *, dim: int, bits_k: int, bits_v: int, group: int = 32) -> Pipeline:
    """Build the pipeline.

    Args:
        key: of nothing: KIVI is not random.
        dim: of the vectors.
        bits_k: a coordinate of keys.
        bits_v: a coordinate of values.
        group: tokens that share a channel's step, and channels that share a token's.

    Raises:
        ValueError: `group` does not divide `dim`.

    Example:
        >>> pipeline(jax.random.key(0), dim=64, bits_k=2, bits_v=2).block
        32
    """
    if group < 1 or dim % group:
        raise ValueError(f"group must divide dim = {dim}, got {group}")
    return Pipeline(
        keys=PerChannel(dim=dim, bits=bits_k), values=PerToken(dim=dim, bits=bits_v, group=group), block=group
    )


EXAMPLES = (lambda: PerToken(dim=64, bits=3), lambda: pipeline(jax.random.key(0), dim=64, bits_k=2, bits_v=2, group=8))
