"""Eight-bit floats with one scale a vector: what production serves where the hardware multiplies them.

References:
    P. Micikevicius et al., "FP8 formats for deep learning", arXiv:2209.05433, s. 3 (E4M3 and E5M2).

Differs from the paper: one scale a vector (a token of one head), which puts its largest magnitude at the largest number
of the format, instead of one a tensor. Arithmetic stays in float32 here: only the storage is 8 bits wide.
"""

from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from jaxquant import quantizers
from jaxquant._pytree import pytree, static

_LARGEST = 2.0**100


@pytree
class Float8:
    """Coordinates as 8-bit floats, times a scale."""

    dim: int = static()
    dtype: Literal["float8_e4m3fn", "float8_e5m2"] = static(default="float8_e4m3fn")
    scale_dtype: quantizers.ScaleDtype = static(default="float16")

    def quantize(self, x: Float[Array, "*batch dim"], /) -> quantizers.Quantized:
        """Code vectors."""
        x = jnp.clip(jnp.nan_to_num(x.astype(jnp.float32)), -_LARGEST, _LARGEST)
        scales = quantizers.rounded(jnp.max(jnp.abs(x), axis=-1), self.scale_dtype)
        size = jnp.maximum(scales.astype(jnp.float32), jnp.finfo(jnp.float32).tiny)[..., None]
        levels = (jnp.clip(x / size, -1, 1) * self._top).astype(self.dtype)
        return quantizers.Quantized(codes=lax.bitcast_convert_type(levels, jnp.uint8), scales=scales)

    def expand(self, code: quantizers.Quantized, /) -> Float[Array, "*batch dim"]:
        """Widen and scale."""
        assert code.scales is not None
        levels = lax.bitcast_convert_type(code.codes, jnp.dtype(self.dtype)).astype(jnp.float32)
        return levels * (code.scales.astype(jnp.float32) / self._top)[..., None]

    def restore(self, y: Float[Array, "*batch dim"], /) -> Float[Array, "*batch dim"]:
        """Return `y`."""
        return y

    def project(self, q: Float[Array, "*batch dim"], /) -> Float[Array, "*batch dim"]:
        """Cast to float32."""
        return q.astype(jnp.float32)

    @property
    def _top(self) -> float:
        return float(jnp.finfo(self.dtype).max)


def kv(key: PRNGKeyArray, *, dim: int, bits_k: int, bits_v: int) -> tuple[Float8, Float8]:
    """Build the pair of quantizers for a cache; the key is not used.

    Raises:
        ValueError: `bits_k` or `bits_v` is not 8.

    Example:
        >>> import jax
        >>> keys, values = kv(jax.random.key(0), dim=64, bits_k=8, bits_v=8)
        >>> quantizers.quantize(keys, jnp.ones(64)).nbytes
        66
    """
    for name, bits in {"bits_k": bits_k, "bits_v": bits_v}.items():
        if bits != 8:
            raise ValueError(f"{name} must be 8 for 8-bit floats, got {bits}")
    return Float8(dim=dim), Float8(dim=dim)


EXAMPLES = (lambda: Float8(dim=64), lambda: Float8(dim=64, dtype="float8_e5m2"))
