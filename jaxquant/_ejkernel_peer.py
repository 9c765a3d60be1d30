"""ejkernel's decode attention over pages of its own TurboQuant codes, timed and checked: the nearest peer in JAX.

Its keys have bits - 1 bits, a sign of a sketch of 128 rows each and two norms, its values bits and a norm; a code takes
4 bits in memory, whatever its width. One call codes the newest token into its page and attends from it.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxquant import _stopwatch

PLATFORMS = ("xla", "tilelang")
_PAGE, _SKETCH = 128, 128


class _Setting(NamedTuple):
    """What decides the codes, and the function that reads them."""

    attend: Callable[..., tuple[Array, ...]]
    rotation: Array
    projection: Array
    keys: Array
    values: Array
    bits: int


def nbytes(batch: int, tokens: int, kv_heads: int, dim: int) -> int:
    """Count the bytes of codes, signs and norms."""
    return batch * tokens * kv_heads * (dim + _SKETCH // 8 + 6)


def seconds(
    platform: str, bits: tuple[int, int], *, batch: int, tokens: int, heads: int, kv_heads: int, dim: int
) -> float:
    """Time one decode step of one layer.

    Raises:
        ImportError: ejkernel or what it needs is not installed.
        ValueError: it has no such setting.
    """
    setting = _setting(platform, bits, dim)
    pages = batch * -(-tokens // _PAGE)
    layers = _stopwatch.layers(nbytes(batch, tokens, kv_heads, dim))
    random = jax.random.bits(jax.random.key(0), (2**20,), jnp.uint8) & jnp.uint8(0x11 * (setting.keys.size - 1))
    norms = jax.random.uniform(jax.random.key(1), (2**18,), jnp.bfloat16, 0.7, 1.3)
    held = [
        tuple(
            _stopwatch.tiled(random if x.dtype == jnp.uint8 else norms, x.shape) for x in _pages(pages, kv_heads, dim)
        )
        for _ in range(layers)
    ]
    new = jax.random.normal(jax.random.key(2), (2, batch, kv_heads, dim), jnp.bfloat16)
    starts, lengths = jnp.arange(batch + 1, dtype=jnp.int32), jnp.full(batch, tokens, jnp.int32)

    def step(carry: tuple[Array, list[tuple[Array, ...]]]) -> tuple[Array, list[tuple[Array, ...]]]:
        q, held = carry
        after = []
        for layer in held:  # pages are carried along, so that the token is written in place
            out, *layer = _call(setting, q, new, layer, lengths, starts, 1)
            q = _stopwatch.chained(q, out)
            after.append(tuple(layer))
        return q, after

    queries = jax.random.normal(jax.random.key(3), (batch, heads, dim), jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        return _stopwatch.median(step, (queries, held)) / layers


def error(
    platform: str, bits: tuple[int, int], *, batch: int, tokens: int, heads: int, kv_heads: int, dim: int
) -> float:
    """Compare with its own estimate of the scores, and its own decoded values, in float64, on ragged rows."""
    setting = _setting(platform, bits, dim)
    lengths = tokens - 7 * np.arange(batch) % tokens
    pages = _pages(batch * -(-tokens // _PAGE), kv_heads, dim)
    q, k, v = (
        jax.random.normal(jax.random.key(i), (batch, tokens, n, dim)) for i, n in enumerate((heads, kv_heads, kv_heads))
    )

    def rows(x: Array, first: Any, last: Any) -> Array:
        return jnp.concatenate([x[row, first[row] : last[row]] for row in range(batch)])

    with jax.numpy_dtype_promotion("standard"):
        for first, last, block in ((0 * lengths, lengths - 1, 8), (lengths - 1, lengths, 1)):
            starts, held = (jnp.asarray(x, jnp.int32) for x in (np.append(0, np.cumsum(last - first)), last))
            fresh = jnp.stack([rows(k, first, last), rows(v + 0.5, first, last)])
            out, *pages = _call(setting, rows(q, first, last), fresh, pages, held, starts, block)
    scores, values = _decoded(setting, rows(q, lengths - 1, lengths), pages, batch)
    scores = np.where(np.arange(scores.shape[-1]) < lengths[:, None, None, None], scores * dim**-0.5, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    want = np.einsum("bhrt,bthd->bhrd", weights, values, optimize=True).reshape(out.shape)
    return float(np.linalg.norm(np.asarray(out, np.float64) - want) / np.linalg.norm(want))


@functools.cache
def _setting(platform: str, bits: tuple[int, int], dim: int) -> _Setting:
    if bits[0] != bits[1] or not 2 <= bits[0] <= 4:
        raise ValueError(f"ejkernel has one setting for keys and values, from 2 to 4 bits, not K{bits[0]}V{bits[1]}")
    name = "ragged_page_attention_v3_turboquant"
    attend = getattr(importlib.import_module(f"ejkernel.kernels._{platform}.{name}"), name)
    turboquant = importlib.import_module("ejkernel.quantization.turboquant")
    keys, values = (
        jnp.asarray(turboquant.solve_lloyd_max(bits=width, dim=dim).centroids, jnp.float32)
        for width in (bits[0] - 1, bits[0])
    )
    rotation = turboquant.generate_rotation_matrix(0, dim)
    return _Setting(attend, rotation, turboquant.generate_projection_matrix(1, _SKETCH, dim), keys, values, bits[0])


def _pages(pages: int, kv_heads: int, dim: int) -> list[Array]:
    lead = (pages, _PAGE, kv_heads)
    codes, signs, norms = (*lead, dim // 2), (*lead, _SKETCH // 8), (*lead, 2)
    shapes = [(codes, jnp.uint8), (signs, jnp.uint8), (norms, jnp.bfloat16), (codes, jnp.uint8), (lead, jnp.bfloat16)]
    return [jnp.zeros(shape, dtype) for shape, dtype in shapes]


def _call(
    setting: _Setting, q: Array, new: Array, pages: Any, lengths: Array, starts: Array, queries: int
) -> tuple[Array, ...]:
    batch = lengths.shape[0]
    return setting.attend(
        *(q, new[0], new[1], *pages, lengths),
        jnp.arange(pages[0].shape[0], dtype=jnp.int32),
        starts,
        jnp.array([batch, batch, batch], jnp.int32),
        *(setting.rotation, setting.projection, setting.keys, setting.values),
        bits=setting.bits,
        qjl_dim=_SKETCH,
        num_queries_per_block=queries,
    )


def _decoded(setting: _Setting, q: Array, pages: Any, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Give the scores that its codes stand for, by its own rule, and its decoded values."""
    turboquant = importlib.import_module("ejkernel.quantization.turboquant")
    codes, signs, norms, value_codes, value_norms = (x.reshape(batch, -1, *x.shape[2:]) for x in pages)
    rows = np.asarray(q, np.float64).reshape(batch, codes.shape[2], -1, q.shape[-1])
    rotation, projection, key_levels, value_levels = (np.asarray(x, np.float64) for x in setting[1:5])
    norms, value_norms = (np.asarray(x, np.float64) for x in (norms, value_norms))
    levels = key_levels[np.asarray(turboquant.unpack_4bit(codes))] * norms[..., :1]
    sketched = np.asarray(turboquant.unpack_signs(signs), np.float64) * norms[..., 1:]
    factor = np.sqrt(np.pi / 2) / _SKETCH
    scores = np.einsum("bhrd,bthd->bhrt", rows @ rotation.T, levels, optimize=True)
    scores += factor * np.einsum("bhrm,bthm->bhrt", rows @ projection.T, sketched, optimize=True)
    values = value_levels[np.asarray(turboquant.unpack_4bit(value_codes))] @ rotation
    return scores, values * value_norms[..., None]
