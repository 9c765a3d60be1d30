"""How much a quantizer loses, stores and costs, on vectors of known statistics, beside the theoretical bounds."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxquant import quantizers
from jaxquant.protocols import Quantizer


def _gaussian(key: PRNGKeyArray, count: int, dim: int) -> Array:
    return jax.random.normal(key, (count, dim))


def _outliers(key: PRNGKeyArray, count: int, dim: int) -> Array:
    x = jax.random.normal(key, (count, dim))
    return x.at[:, jnp.array([dim // 5, dim // 2])].multiply(20.0)


def _offset(key: PRNGKeyArray, count: int, dim: int) -> Array:
    return jax.random.normal(key, (count, dim)).at[:, dim // 3].add(30.0)


def _one_hot(key: PRNGKeyArray, count: int, dim: int) -> Array:
    return jax.nn.one_hot(jax.random.randint(key, (count,), 0, dim), dim)


def _two_hot(key: PRNGKeyArray, count: int, dim: int) -> Array:
    first, second = jax.random.randint(key, (2, count), 0, dim // 2)
    return jax.nn.one_hot(first, dim) + jax.nn.one_hot(dim // 2 + second, dim)


def _student(key: PRNGKeyArray, count: int, dim: int) -> Array:
    return jax.random.t(key, 2.5, (count, dim))


def _scales(key: PRNGKeyArray, count: int, dim: int) -> Array:
    first, second = jax.random.split(key)
    return jax.random.normal(first, (count, dim)) * jnp.exp(jax.random.normal(second, (dim,)))


INPUTS: dict[str, Callable[[PRNGKeyArray, int, int], Array]] = {
    "gaussian": _gaussian,
    "outliers": _outliers,
    "offset": _offset,
    "one-hot": _one_hot,
    "two-hot": _two_hot,
    "student-t": _student,
    "log-normal": _scales,
}
"""Vectors of known statistics: two channels x20, one channel +30, Student-t(2.5), log-normal channel scales, ..."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quality:
    """What decoding gives back.

    Attributes:
        nmse: mean over vectors of |x - y|^2 / |x|^2.
        cosine: mean cosine of x and y.
        worst_cosine: the smallest.
        gain: mean of <x, y> / |x|^2; 1 is unbiased.
        bytes_per_vector: stored, scale included.
    """

    nmse: float
    cosine: float
    worst_cosine: float
    gain: float
    bytes_per_vector: float

    @property
    def snr(self) -> float:
        """Signal-to-noise ratio, in dB."""
        return -10 * math.log10(self.nmse) if self.nmse else math.inf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """Medians over interleaved runs in one process.

    Attributes:
        quantize: vectors a second.
        dequantize: vectors a second.
        quantize_ratio: time as a multiple of one [count, dim] x [dim, dim] float32 matrix product.
        dequantize_ratio: likewise.
    """

    quantize: float
    dequantize: float
    quantize_ratio: float
    dequantize_ratio: float


def bounds(bits: int) -> tuple[float, float]:
    """Give TurboQuant's upper bound of the NMSE, sqrt(3) pi / 2 * 4**-bits, and Shannon's lower bound, 4**-bits.

    Example:
        >>> [round(bound, 4) for bound in bounds(2)]
        [0.17, 0.0625]

    References:
        A. Zandieh et al., arXiv:2504.19874, theorem 1 and theorem 3.
    """
    return math.sqrt(3) * math.pi / 2 * 4.0**-bits, 4.0**-bits


def quality(quantizer: Quantizer, x: Float[Array, "count dim"]) -> Quality:
    """Quantize and decode vectors, and compare.

    Example:
        >>> from jaxquant.methods import turboquant
        >>> x = INPUTS["gaussian"](jax.random.key(0), 1000, 128)
        >>> round(quality(turboquant.mse(jax.random.key(1), dim=128, bits=4), x).snr)
        20
    """
    code = quantizers.quantize(quantizer, x)
    y = np.asarray(quantizers.dequantize(quantizer, code), np.float64)
    original = np.asarray(x, np.float64)
    energy = np.sum(original**2, axis=-1)
    along = np.sum(original * y, axis=-1)
    cosine = along / np.sqrt(energy * np.sum(y**2, axis=-1))
    return Quality(
        nmse=float(np.mean(np.sum((y - original) ** 2, axis=-1) / energy)),
        cosine=float(np.mean(cosine)),
        worst_cosine=float(np.min(cosine)),
        gain=float(np.mean(along / energy)),
        bytes_per_vector=sum(leaf.nbytes for leaf in jax.tree.leaves(code)) / x.shape[0],
    )


def speed(quantizer: Quantizer, x: Float[Array, "count dim"], *, repeats: int = 7) -> Speed:
    """Time quantizing and decoding against one matrix product, after a warm-up, in turns.

    Example:
        >>> from jaxquant.methods import turboquant
        >>> x = INPUTS["gaussian"](jax.random.key(0), 1000, 64)
        >>> speed(turboquant.mse(jax.random.key(1), dim=64, bits=4), x).quantize_ratio > 0
        True
    """
    code = quantizers.quantize(quantizer, x)
    square = jnp.eye(x.shape[-1], dtype=jnp.float32)
    calls: list[Callable[[], Any]] = [
        lambda: _product(x.astype(jnp.float32), square),
        lambda: quantizers.quantize(quantizer, x),
        lambda: quantizers.dequantize(quantizer, code),
    ]
    times = np.empty((repeats, len(calls)))
    for call in calls:
        jax.block_until_ready(call())
    for repeat in range(repeats):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[repeat, i] = time.perf_counter() - start
    product, quantize, dequantize = np.median(times, axis=0)
    return Speed(
        quantize=float(x.shape[0] / quantize),
        dequantize=float(x.shape[0] / dequantize),
        quantize_ratio=float(quantize / product),
        dequantize_ratio=float(dequantize / product),
    )


@jax.jit
def _product(x: Array, square: Array) -> Array:
    return x @ square
