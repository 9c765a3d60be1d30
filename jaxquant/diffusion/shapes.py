"""Pictures of five shapes, and the small transformer trained on them in a minute: a model whose features drift.

A random network's keys and values tell nothing of how a trained one's change from step to step. This is the least that
does.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray, PyTree

from jaxquant.diffusion import flow
from jaxquant.diffusion.dit import DiT

NAMES = ("disc", "ring", "square", "row", "column")


def draw(key: PRNGKeyArray, count: int, *, side: int) -> tuple[Float[Array, "count side side 1"], Int[Array, " count"]]:
    """Draw pictures in [-1, 1] with soft edges, and their classes.

    Args:
        key: of classes, places, sizes and brightness.
        count: of pictures.
        side: of a picture, in pixels.

    Example:
        >>> pictures, labels = draw(jax.random.key(0), 4, side=16)
        >>> pictures.shape, bool(jnp.abs(pictures).max() <= 1)
        ((4, 16, 16, 1), True)
    """
    of_class, of_place, of_size, of_light = jax.random.split(key, 4)
    label = jax.random.randint(of_class, (count,), 0, len(NAMES))
    centre = jax.random.uniform(of_place, (count, 2, 1, 1), minval=-0.4, maxval=0.4)
    size = jax.random.uniform(of_size, (count, 1, 1), minval=0.25, maxval=0.5)
    light = jax.random.uniform(of_light, (count, 1, 1), minval=0.6, maxval=1.0)
    axis = jnp.linspace(-1 + 1 / side, 1 - 1 / side, side)
    y, x = axis[None, :, None] - centre[:, 0], axis[None, None, :] - centre[:, 1]
    radius = jnp.hypot(y, x)
    outside = jnp.stack(
        [
            radius - size,
            jnp.abs(radius - size) - 0.12,
            jnp.maximum(jnp.abs(y), jnp.abs(x)) - size,
            jnp.abs(y) - 0.15 + 0 * x,
            jnp.abs(x) - 0.15 + 0 * y,
        ]
    )
    distance = jnp.take_along_axis(outside, label[None, :, None, None], axis=0)[0]
    return (2 * light * jax.nn.sigmoid(-distance * side) - 1)[..., None], label


def train(
    key: PRNGKeyArray,
    *,
    steps: int = 300,
    batch: int = 32,
    side: int = 16,
    hidden: int = 96,
    heads: int = 3,
    layers: int = 3,
    rate: float = 2e-3,
) -> tuple[DiT, Float[Array, " steps"]]:
    """Train the small transformer on `draw`.

    Args:
        key: of the weights and of the pictures.
        steps: of Adam.
        batch: pictures a step.
        side: of a picture.
        hidden: width of the residual stream.
        heads: of attention.
        layers: blocks.
        rate: first learning rate, which falls to 0 as a cosine.

    Returns:
        The model and the loss of every step.

    Example:
        >>> model, losses = train(jax.random.key(0), steps=1, batch=2, side=4, hidden=8, heads=1, layers=1)
        >>> losses.shape
        (1,)
    """
    first, second = jax.random.split(key)
    classes = len(NAMES)
    model = DiT(side=side, classes=classes, hidden=hidden, heads=heads, layers=layers, rngs=nnx.Rngs(first))
    graph, weights = nnx.split(model)
    optimizer = optax.adam(lambda count: rate * (0.5 + 0.5 * jnp.cos(jnp.pi * jnp.asarray(count, jnp.float32) / steps)))

    def loss(weights: PyTree[Array], key: PRNGKeyArray) -> Float[Array, ""]:
        of_pictures, of_loss = jax.random.split(key)
        pictures, labels = draw(of_pictures, batch, side=side)
        return flow.loss(of_loss, nnx.merge(graph, weights), pictures, labels, none=classes)

    @jax.jit
    def run(weights: PyTree[Array], keys: Key[Array, " steps"]) -> tuple[PyTree[Array], Float[Array, " steps"]]:
        def step(carry, key):
            weights, memory = carry
            value, gradient = jax.value_and_grad(loss)(weights, key)
            with jax.numpy_dtype_promotion("standard"):  # Adam raises a float to its integer count of steps
                change, memory = optimizer.update(gradient, memory, weights)
            return (jax.tree.map(jnp.add, weights, change), memory), value

        (weights, _), losses = jax.lax.scan(step, (weights, optimizer.init(weights)), keys)
        return weights, losses

    weights, losses = run(weights, jax.random.split(second, steps))
    return nnx.merge(graph, weights), losses
