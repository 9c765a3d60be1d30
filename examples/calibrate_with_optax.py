"""Learn the levels of a codebook with optax, for what attention makes of them instead of for the squared error.

    python examples/calibrate_with_optax.py [--steps 200]

Keys and queries of one head are collected from the small model over held-out text. The four levels of a 2-bit code are
then moved by Adam, so that attention weights over coded keys diverge less from those over exact keys. Tokens that were
learned from and tokens that are judged on are different. `jaxquant calibrate` does this to whole models, and better:
with a basis and a width for every direction.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer

from jaxquant import models
from jaxquant.calibrate import statistics
from jaxquant.methods import turboquant
from jaxquant.quantizers import Scalar


def divergence(quantizer: Scalar, q: jax.Array, k: jax.Array) -> jax.Array:
    """Average KL of attention over codes from attention over keys; q [tokens, group, dim], k [tokens, dim]."""
    places = jnp.arange(len(k))
    visible = (places[:, None] >= places)[:, None]
    logs = []
    for keys in (k, quantizer.restore(quantizer.expand(quantizer.quantize(k)))):
        scores = jnp.einsum("tgd,sd->tgs", q, keys) / k.shape[-1] ** 0.5
        logs.append(jax.nn.log_softmax(jnp.where(visible, scores, -1e30)))
    return jnp.mean(jnp.sum(jnp.exp(logs[0]) * (logs[0] - logs[1]), axis=-1))


def main(
    steps: int = 200, layer: int = 2, rate: Annotated[float, typer.Option(help="of learning")] = 0.01, rows: int = 2
) -> None:
    """Collect, learn, and judge."""
    model = models.load()
    text = (model.folder / "held_out.txt").read_text(encoding="utf-8")
    tokens = np.asarray(model.tokenizer.encode(text)[: rows * 256], np.int32).reshape(rows, 256)
    learned, judged = (
        statistics.collect(model.decoder, half, batch=1, samples=256 * len(half)) for half in np.split(tokens, 2)
    )
    q, k, other_q, other_k = (
        jnp.asarray(samples[layer, 0])
        for found in (learned, judged)
        for samples in (found.query_samples, found.key_samples)
    )
    start = turboquant.mse(jax.random.key(0), dim=model.architecture.dim, bits=2, scale="preserve")

    def moved(levels: jax.Array) -> Scalar:
        return dataclasses.replace(start, codebook=dataclasses.replace(start.codebook, centroids=jnp.sort(levels)))

    optimizer = optax.adam(rate)

    @jax.jit
    def step(levels: jax.Array, state: optax.OptState) -> tuple[jax.Array, optax.OptState, jax.Array]:
        loss, slope = jax.value_and_grad(lambda levels: divergence(moved(levels), q, k))(levels)
        updates, state = optimizer.update(slope, state)
        return optax.apply_updates(levels, updates), state, loss  # pyright: ignore[reportReturnType]

    levels = best = start.codebook.centroids
    state, least = optimizer.init(levels), jnp.inf
    for _ in range(steps):
        tried = levels
        levels, state, loss = step(levels, state)
        if loss < least:
            best, least = tried, loss
    before, after = (float(divergence(moved(x), other_q, other_k)) for x in (start.codebook.centroids, best))
    print("levels:", np.round(np.asarray(start.codebook.centroids), 3), "->", np.round(np.asarray(best), 3))
    print(f"divergence of attention on other text: {before:.4f} -> {after:.4f} nats")


if __name__ == "__main__":
    typer.run(main)
