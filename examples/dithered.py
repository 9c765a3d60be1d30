"""Subtractive dither: uniform integers with a shared random shift for each coordinate, taken off again in the decoder.

A method in somebody else's file. jaxquant knows nothing of it; with this folder on the path,

    jaxquant eval --method dithered:kv --bits-k 4 --bits-v 4

puts it into the cache and measures it.

References:
    A. Abdi, F. Fekri, "Nested dithered quantization for communication reduction in distributed training",
    arXiv:1904.01197, s. 2; R. M. Gray, T. G. Stockham, "Dithered quantizers", IEEE Trans. Inf. Theory 39 (1993).

Differs from the paper: it is about gradients; one dither for each coordinate, drawn once, instead of one for each
number that is coded; not nested.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxquant import packing, quantizers
from jaxquant.protocols import pytree, static


@pytree
class Dithered:
    """Codes round(x / step + dither), decoded as (code - dither) * step."""

    dither: Float[Array, " dim"]
    bits: int = static()

    @property
    def dim(self) -> int:
        """Length of the vectors."""
        return self.dither.shape[-1]

    def quantize(self, x: Float[Array, "*batch dim"], /) -> quantizers.Quantized:
        """Code vectors."""
        x = jnp.clip(jnp.nan_to_num(x.astype(jnp.float32)), -(2.0**100), 2.0**100)
        top = 2 ** (self.bits - 1) - 0.5
        scales = quantizers.rounded(jnp.max(jnp.abs(x), axis=-1) / top, "float16")
        step = jnp.maximum(scales.astype(jnp.float32), 2.0**-24)[..., None]
        codes = jnp.clip(jnp.round(x / step + self.dither) + 2 ** (self.bits - 1), 0, 2**self.bits - 1)
        return quantizers.Quantized(codes=packing.pack(codes.astype(jnp.uint8), bits=self.bits), scales=scales)

    def expand(self, code: quantizers.Quantized, /) -> Float[Array, "*batch dim"]:
        """Take the dither off and scale."""
        assert code.scales is not None
        codes = packing.unpack(code.codes, bits=self.bits, length=self.dim).astype(jnp.float32)
        return (codes - 2 ** (self.bits - 1) - self.dither) * code.scales.astype(jnp.float32)[..., None]

    def restore(self, y: Float[Array, "*batch dim"], /) -> Float[Array, "*batch dim"]:
        """Return `y`."""
        return y

    def project(self, q: Float[Array, "*batch dim"], /) -> Float[Array, "*batch dim"]:
        """Cast to float32."""
        return q.astype(jnp.float32)


def kv(key: PRNGKeyArray, *, dim: int, bits_k: int, bits_v: int) -> tuple[Dithered, Dithered]:
    """Build the pair of quantizers for a cache.

    Example:
        >>> keys, values = kv(jax.random.key(0), dim=64, bits_k=4, bits_v=2)
        >>> keys.bits, values.bits
        (4, 2)
    """
    draws = jax.random.uniform(key, (2, dim), minval=-0.5, maxval=0.5)
    return Dithered(dither=draws[0], bits=bits_k), Dithered(dither=draws[1], bits=bits_v)


EXAMPLES = (
    lambda: kv(jax.random.key(0), dim=64, bits_k=4, bits_v=3)[0],
    lambda: kv(jax.random.key(0), dim=64, bits_k=4, bits_v=3)[1],
)
