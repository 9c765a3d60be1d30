"""What fits: bytes, longest context and time of a decode step for a model, before anything is allocated.

Bytes are those of the buffers that `cache.init` would make, to the last one. The time of a step is a bound from below
times measured shares: everything that a step reads, weights and cache, at the bandwidth of the memory.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxquant import cache, quantizers
from jaxquant._stacks import KVCache
from jaxquant.models.architecture import Architecture
from jaxquant.models.decoder import Decoder
from jaxquant.protocols import Quantizer

Pair = tuple[Quantizer, Quantizer]


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices that share a model and its cache evenly.

    Attributes:
        devices: how many.
        memory: bytes of each.
        bandwidth: bytes a second that each reads.
        reserve: share of the memory that is kept free, for activations and the compiler.
    """

    devices: int
    memory: int | float
    bandwidth: int | float
    reserve: int | float = 0.08

    def __post_init__(self):
        """Check the numbers."""
        for name in ("devices", "memory", "bandwidth"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
            if math.isinf(getattr(self, name)):
                raise ValueError(f"{name} must be finite, got {getattr(self, name)}")
        if not 0 <= self.reserve < 1:
            raise ValueError(f"reserve must be from 0 to below 1, got {self.reserve}")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one kind of cache takes.

    Attributes:
        cache: bytes of it, for all rows and all devices together.
        weights: bytes of the model, likewise.
        bytes_per_token: bytes of the cache for one more token of one row.
        fits: whether both go into the memory that is not reserved.
        longest: tokens of a row that fit, 0 where the weights alone do not.
        seconds: predicted time of a decode step in which every row reads `context` tokens.
    """

    cache: int
    weights: int
    bytes_per_token: float
    fits: bool
    longest: int
    seconds: float


def weights(architecture: Architecture, dtype: str = "bfloat16") -> int:
    """Count the bytes of a model's weights.

    Example:
        >>> from jaxquant import models
        >>> model = models.load()
        >>> weights(model.architecture, "float32") == sum(x.nbytes for x in jax.tree.leaves(nnx.state(model.decoder)))
        True
    """
    shapes = nnx.eval_shape(lambda: Decoder(architecture, rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(shapes, nnx.Param))) * jnp.dtype(dtype).itemsize


def cache_bytes(
    architecture: Architecture, pair: Pair | None, *, context: int, batch: int, sinks: int = 0, window: int = 0
) -> int:
    """Count the bytes of a cache without making it.

    Args:
        architecture: of the model.
        pair: quantizers of keys and values; None for bfloat16.
        context: tokens of a row.
        batch: rows.
        sinks: first tokens that stay exact.
        window: newest tokens that stay exact.
    """
    exact = quantizers.Exact(dim=architecture.dim)

    def make() -> KVCache:
        return cache.init(
            *(pair or (exact, exact)),
            layers=architecture.layers,
            batch=batch,
            kv_heads=architecture.kv_heads,
            capacity=context,
            sinks=sinks if pair else 0,
            window=window if pair else 0,
        )

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(make)))


def plan(
    held: Callable[[int], int],
    model: int,
    machine: Machine,
    *,
    context: int,
    batch: int,
    share: int | float,
    model_share: int | float = 1.0,
    fixed: float = 0.0,
) -> Plan:
    """Plan one kind of cache.

    Args:
        held: gives the bytes of the cache for a number of tokens a row; must not fall.
        model: bytes of the weights.
        machine: to run on.
        context: tokens of a row.
        batch: rows.
        share: of the bandwidth that attention over this cache reaches.
        model_share: of the bandwidth that products with the weights reach.
        fixed: seconds of a step that nothing is read in: launches, and appending a token.

    Raises:
        ValueError: a size is out of range.

    Example:
        >>> machine = Machine(devices=1, memory=1000, bandwidth=1e6, reserve=0)
        >>> plan(lambda tokens: 4 * tokens, 200, machine, context=100, batch=1, share=0.5)
        Plan(cache=400, weights=200, bytes_per_token=4.0, fits=True, longest=200, seconds=0.001)
    """
    for name, size in {"context": context, "batch": batch}.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    for name, part in {"share": share, "model_share": model_share}.items():
        if not 0 < part <= 1:
            raise ValueError(f"{name} must be above 0 and at most 1, got {part}")
    room = machine.devices * machine.memory * (1 - machine.reserve) - model
    total = held(context)
    return Plan(
        cache=total,
        weights=model,
        bytes_per_token=(held(context + 64) - total) / 64 / batch,
        fits=total <= room,
        longest=_most(held, room),
        seconds=(model / model_share + total / share) / (machine.devices * machine.bandwidth) + fixed,
    )


def _most(held: Callable[[int], int], room: int | float) -> int:
    """Find the largest number of tokens that fits."""
    low, high = 0, 1024
    while held(high) <= room:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if middle and held(middle) <= room:
            low = middle
        else:
            high = middle
    return low
