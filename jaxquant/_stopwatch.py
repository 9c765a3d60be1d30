"""Time what runs on a device: dispatch from Python, and what a processor's own caches hold, do not count."""

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

RUNS, SECONDS = 7, 0.05  # runs of a loop, and how long one should take at least
_BEYOND_CACHES = 2**28  # bytes that the layers of a round hold at least
_MOST_LAYERS = 32


def median(step: Callable[..., Any], carry: Any, *data: Any) -> float:
    """Time `carry = step(carry, *data)`, in seconds: the median over runs of one jitted loop of such steps.

    Example:
        >>> median(lambda x: x + 1, jnp.zeros(3)) > 0
        True
    """

    @functools.partial(jax.jit, static_argnums=0)  # a trip count that is not static costs a synchronization a step
    def loop(times: int, carry: Any, *data: Any) -> Any:
        return lax.fori_loop(0, times, lambda _, carry: step(carry, *data), carry)

    def run(times: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(loop(times, carry, *data))
        return time.perf_counter() - start

    run(1)
    times = max(1, min(1000, math.ceil(SECONDS / run(1))))
    run(times)
    return float(np.median([run(times) for _ in range(RUNS)])) / times


def read_bandwidth(nbytes: int | None = None) -> float:
    """Measure how many bytes a second a sum reads, from an array larger than any cache; the better of two layouts."""
    nbytes = nbytes or (2**31 if jax.default_backend() == "gpu" else 2**27)
    times = []
    for columns in (8192, 1024):
        x = jnp.ones((nbytes // 4 // columns, columns), jnp.float32)
        times.append(median(lambda total, x: jnp.sum(x + total[:, None] * 0, axis=1), x[:, 0], x))
    return nbytes / min(times)


def layers(nbytes: int) -> int:
    """Give how many layers of so many bytes a loop must walk over so that no cache of a GPU holds them."""
    return max(1, min(_MOST_LAYERS, -(-_BEYOND_CACHES // nbytes))) if jax.default_backend() == "gpu" else 1


def reason(problem: Exception) -> str:
    r"""Say in a line why something was not timed.

    Example:
        >>> reason(ValueError("no room: 3 GiB\nand where it was"))
        'ValueError: no room: 3 GiB'
    """
    return f"{type(problem).__name__}: {str(problem).strip().partition(chr(10))[0]}"[:200]


@functools.partial(jax.jit, static_argnames="shape")
def tiled(base: Array, shape: tuple[int, ...]) -> Array:
    """Fill a shape by repeating a vector."""
    size = math.prod(shape)
    return jnp.tile(base, -(-size // base.size))[:size].reshape(shape)


def chained(q: Array, out: Array) -> Array:
    """Make the queries of the next call depend on the result of this one."""
    return q + out.astype(q.dtype) * jnp.asarray(1e-3, q.dtype)
