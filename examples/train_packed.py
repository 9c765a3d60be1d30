"""Train a classifier with activations packed to a few bits for the backward pass.

    python examples/train_packed.py [--steps 60] [--layers 12]

Residual blocks learn to name the shape in a picture, four times from the same weights on the same pictures: with
everything remembered, with `jax.checkpoint`, and with the input of every block packed to 4 and to 2 bits. Printed are
the bytes of temporaries of a training step as compiled, and the accuracy on new pictures.
"""

from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax
import typer
from jaxtyping import Array

from jaxquant import activations, stochastic
from jaxquant.diffusion import shapes

SIDE, WIDTH, BATCH = 16, 64, 1024
CLASSES = len(shapes.NAMES)


def block(params: Any, x: Array) -> Array:
    up, down = params
    h = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
    return x + jax.nn.gelu(h @ up) @ down


packed = activations.checkpoint(block)


def logits(params: Any, pictures: Array, key: Array, kind: str, bits: int) -> Array:
    def step(x: Array, each: Any) -> tuple[Array, None]:
        *params, i = each
        if kind == "packed":
            quantizer = stochastic.Stochastic(key=jax.random.fold_in(key, i), dim=WIDTH, bits=bits)
            return packed(quantizer, params, x), None
        return (jax.checkpoint(block) if kind == "checkpoint" else block)(params, x), None

    first, blocks, last = params
    x = pictures.reshape(len(pictures), -1) @ first
    return jax.lax.scan(step, x, (*blocks, jnp.arange(len(blocks[0]))))[0] @ last


def main(
    steps: Annotated[int, typer.Option(help="steps of training")] = 60,
    layers: Annotated[int, typer.Option(help="blocks")] = 12,
) -> None:
    keys = jax.random.split(jax.random.key(0), 6)
    up, down = (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)
    start = (
        jax.random.normal(keys[0], (SIDE * SIDE, WIDTH)) / SIDE,
        [0.5 * jax.random.normal(k, (layers, *s)) * s[0] ** -0.5 for k, s in zip(keys[1:3], (up, down), strict=True)],
        jax.random.normal(keys[3], (WIDTH, CLASSES)) * WIDTH**-0.5,
    )
    optimizer = optax.adam(3e-3)
    new_pictures, new_labels = shapes.draw(keys[4], 1000, side=SIDE)
    for kind, bits in (("plain", 0), ("checkpoint", 0), ("packed", 4), ("packed", 2)):

        @jax.jit
        def step(params: Any, memory: Any, key: Array, kind: str = kind, bits: int = bits) -> tuple[Any, Any, Array]:
            of_pictures, of_codes = jax.random.split(key)
            pictures, labels = shapes.draw(of_pictures, BATCH, side=SIDE)

            def loss(params: Any) -> Array:
                found = logits(params, pictures, of_codes, kind, bits)
                return optax.softmax_cross_entropy_with_integer_labels(found, labels).mean()

            value, gradient = jax.value_and_grad(loss)(params)
            change, memory = optimizer.update(gradient, memory)
            return optax.apply_updates(params, change), memory, value

        params, memory = start, optimizer.init(start)
        program = step.lower(params, memory, keys[5]).compile()
        usage: Any = program.memory_analysis()
        value = jnp.inf
        for key in jax.random.split(keys[5], steps):
            params, memory, value = program(params, memory, key)
        right = jnp.argmax(logits(params, new_pictures, keys[5], "plain", 0), axis=1) == new_labels
        name = f"{kind}, {bits} bits" if bits else kind
        held = usage.temp_size_in_bytes / 2**20
        print(f"{name:16} {held:6.2f} MiB of temporaries, loss {value:.3f}, {right.mean():.1%} of new pictures right")


if __name__ == "__main__":
    typer.run(main)
