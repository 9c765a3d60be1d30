"""Train a small diffusion transformer, and sample from it with guidance whose halves share attention.

    python examples/guided_sampling.py [--train 200] [--steps 12] [--scale 2]

The same noise is followed with attention computed for both halves, shared in every layer at every step, and shared
where a gate finds the halves alike. Printed are the operations of a step as compiled, how often attention was shared,
and how far the pictures are from those without sharing, beside what a blank picture would score.
"""

from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from flax import nnx
from jaxtyping import Array

from jaxquant.diffusion import flow, guidance, quality, shapes

NONE = len(shapes.NAMES)


def main(
    train: Annotated[int, typer.Option(help="steps of training")] = 200,
    steps: Annotated[int, typer.Option(help="steps of sampling")] = 12,
    scale: Annotated[float, typer.Option(help="of the guidance")] = 2.0,
) -> None:
    model, losses = shapes.train(jax.random.key(0), steps=train)
    print(f"loss {losses[:10].mean():.3f} -> {losses[-10:].mean():.3f}")
    graph, weights = nnx.split(model)
    labels = jnp.arange(NONE)
    noise = jax.random.normal(jax.random.key(1), (NONE, model.side, model.side, 1))

    def always(states: Any, attend: Any, x: Array, layer: int) -> tuple[Any, Array]:
        return states, guidance.share(attend, x)

    def gated(gate: guidance.Gate) -> Any:
        def run(states: Any, attend: Any, x: Array, layer: int) -> tuple[Any, Array]:
            (held, count), *rest = states[layer:]
            count += gate.shares(held).astype(jnp.int32)
            held, out = gate.attend(held, attend, x)
            return (*states[:layer], (held, count), *rest), out

        return run

    gate = guidance.Gate(threshold=0.98, refresh=3)
    kinds = {
        "both halves": (lambda states, attend, x, layer: (states, attend(x)), ()),
        "shared": (always, ()),
        "gated": (gated(gate), ((gate.init(), jnp.int32(0)),) * len(model.blocks)),
    }
    reference, blank = noise, 0.0
    for name, (how, states) in kinds.items():

        def velocity(states: Any, x: Array, time: Array, label: Array, how: Any = how) -> tuple[Any, Array]:
            def around(layer: int, attend: Any, x: Array) -> Array:
                nonlocal states
                states, out = how(states, attend, x, layer)
                return out

            out = nnx.merge(graph, weights)(x, time, label, around=around)
            return states, out

        run = jax.jit(
            lambda states, v=velocity: flow.sample(v, states, noise, labels, none=NONE, steps=steps, scale=scale)
        )
        states, pictures = run(states)
        if name == "both halves":
            reference, blank = pictures, quality.blank_psnr(pictures, peak=2.0).mean()
        one = jax.jit(velocity).lower(states, guidance.pair(noise), jnp.zeros(2 * NONE), jnp.tile(labels, 2)).compile()
        operations: Any = one.cost_analysis()
        line = f"{name:12} {operations['flops'] / 1e6:8.1f} million operations a step"
        if name == "gated":
            share = sum(int(count) for _, count in states) / len(states) / steps
            line += f" with both branches, attention shared in {share:.0%} of steps and layers"
        if name != "both halves":
            line += f", PSNR {quality.psnr(reference, pictures, peak=2.0).mean():.1f} dB (a blank picture: {blank:.1f})"
        print(line)
    for row in reference[:, ::2, :, 0].reshape(NONE, -1, model.side).transpose(1, 0, 2):
        print("  ".join("".join(" .:-=+*#%@"[int(jnp.clip((x + 1) * 5, 0, 9))] for x in part) for part in row))


if __name__ == "__main__":
    typer.run(main)
