"""Quantize inside a jitted function: a quantizer is a tree of arrays, so it goes wherever arrays go.

python examples/quantize_in_jit.py
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxquant import quantizers
from jaxquant.methods import turboquant
from jaxquant.quantizers import Quantized, Scalar

traced = []


@jax.jit
def send(quantizer: Scalar, x: jax.Array) -> tuple[Quantized, jax.Array]:
    """Code a batch, and measure what was lost."""
    traced.append(x.shape)  # runs when this is compiled, and not when it is called again
    code = quantizers.quantize(quantizer, x)
    lost = jnp.sum((quantizers.dequantize(quantizer, code) - x) ** 2) / jnp.sum(x**2)
    return code, lost


def main() -> None:
    """Code vectors with several quantizers, with one compilation for each width."""
    x = jax.random.normal(jax.random.key(0), (512, 128))
    for bits in (2, 4, 8):  # a width sets shapes: it is static, and compiles anew
        quantizer = turboquant.mse(jax.random.key(1), dim=128, bits=bits)
        code, lost = send(quantizer, x)
        print(f"{bits} bits: {code.nbytes / len(x):.0f} bytes in place of {4 * 128}, {lost:.5f} of the energy lost")

    compiled = len(traced)
    _, other = send(turboquant.mse(jax.random.key(2), dim=128, bits=8), x)  # another rotation: other numbers
    print(f"another rotation loses {other:.5f} and compiles {len(traced) - compiled} times")

    # Many quantizers at once: stack their leaves, and map.
    drawn = jax.vmap(lambda key: turboquant.mse(key, dim=128, bits=2))(jax.random.split(jax.random.key(3), 8))
    losses = jax.vmap(lambda quantizer: send(quantizer, x)[1])(drawn)
    print(f"eight rotations lose between {losses.min():.5f} and {losses.max():.5f} at 2 bits")

    # Levels are leaves too: a gradient says which way to move them.
    quantizer = turboquant.mse(jax.random.key(1), dim=128, bits=2)

    def loss(centroids: jax.Array) -> jax.Array:
        book = dataclasses.replace(quantizer.codebook, centroids=centroids)
        return send(dataclasses.replace(quantizer, codebook=book), x)[1]

    slope = jax.grad(loss)(quantizer.codebook.centroids)
    print(f"moving the four levels changes that by at most {jnp.abs(slope).max():.4f} a unit: they are optimal")


if __name__ == "__main__":
    main()
