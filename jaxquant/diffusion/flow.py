"""Rectified flow: pictures as the end of straight lines from noise. A loss to train with, and Euler steps to sample.

References:
    X. Liu, C. Gong, Q. Liu, "Flow straight and fast: Learning to generate and transfer data with rectified flow",
    arXiv:2209.03003, eq. 1.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from jaxquant.diffusion import guidance

Velocity = Callable[[Array, Array, Array], Array]
"""A network: pictures, times and classes to velocities."""

Guided = Callable[[PyTree[Any], Array, Array, Array], tuple[PyTree[Any], Array]]
"""The same for both halves of a guided batch, with a state from step to step: state first, state returned."""


def loss(
    key: PRNGKeyArray,
    velocity: Velocity,
    pictures: Float[Array, "batch ..."],
    labels: Int[Array, " batch"],
    *,
    none: int,
    dropped: float = 0.1,
) -> Float[Array, ""]:
    """Give the mean squared error of the velocity at random times.

    Args:
        key: of noise, times and dropped classes.
        velocity: the network.
        pictures: to learn.
        labels: their classes.
        none: the class that stands for no class.
        dropped: share of classes that are replaced by it, so that guidance has an unconditional half.

    Example:
        >>> loss(jax.random.key(0), lambda x, t, c: x * 0, jnp.zeros((64, 9)), jnp.zeros(64, int), none=1) > 0.5
        Array(True, dtype=bool)
    """
    of_noise, of_time, of_class = jax.random.split(key, 3)
    batch = pictures.shape[0]
    noise = jax.random.normal(of_noise, pictures.shape, pictures.dtype)
    time = jax.random.uniform(of_time, (batch,), pictures.dtype)
    labels = jnp.where(jax.random.bernoulli(of_class, dropped, (batch,)), jnp.asarray(none, labels.dtype), labels)
    along = time.reshape(batch, *(1,) * (pictures.ndim - 1))
    guess = velocity((1 - along) * noise + along * pictures, time, labels)
    return jnp.mean(jnp.square(guess - (pictures - noise)))


def sample(
    velocity: Guided,
    state: PyTree[Any],
    noise: Float[Array, "batch ..."],
    labels: Int[Array, " batch"],
    *,
    none: int,
    steps: int,
    scale: float | Float[Array, ""],
) -> tuple[PyTree[Any], Float[Array, "batch ..."]]:
    """Follow the guided velocity from noise to pictures.

    Args:
        velocity: takes a state, a batch with its conditional half first, times and classes; returns the next state and
            the velocities of both halves.
        state: before the first step: of gates, of a compressed stream, or ().
        noise: where to start.
        labels: classes of the conditional half.
        none: the class of the other half.
        steps: of equal length.
        scale: of the guidance.

    Returns:
        The state after the last step, and the pictures.

    Raises:
        ValueError: `steps` is less than 1.

    Example:
        >>> constant = lambda state, x, time, label: (state + 1, jnp.ones_like(x))
        >>> sample(constant, 0, jnp.zeros((1, 2)), jnp.zeros(1, int), none=1, steps=4, scale=3.0)
        (Array(4, dtype=int32, weak_type=True), Array([[1., 1.]], dtype=float32))
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    both = jnp.concatenate([labels, jnp.full_like(labels, none)])

    def step(carry: tuple[Any, Array], time: Array) -> tuple[tuple[Any, Array], None]:
        state, x = carry
        state, guess = velocity(state, guidance.pair(x), jnp.full(both.shape, time, x.dtype), both)
        return (state, x + guidance.guide(guess, scale=scale) / steps), None

    times = jnp.arange(steps, dtype=noise.dtype) / steps
    return lax.scan(step, (state, noise), times)[0]
