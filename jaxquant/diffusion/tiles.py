"""Decode latents in overlapping tiles, so that memory is one tile's and not the whole picture's.

A tile is decoded with `halo` latents of context on every inner side, which are cut off, and fades into its neighbours
over `overlap` latents. A decoder that sees at most `halo` latents far, and whose result does not depend on the place or
the size of its input otherwise, gives what it would give for the whole. Statistics over the whole picture (group
normalisation, attention) break that: then tiles differ, and fading hides their seams.

`in_time` decodes videos: a causal decoder keeps the last frames it saw as state, and chunks of frames follow.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PyTree


def decode(
    decoder: Callable[[Array], Array],
    latents: Float[Array, "batch *frames height width channels"],
    *,
    tile: int | tuple[int, int],
    overlap: int = 4,
    halo: int = 0,
) -> Float[Array, "batch *frames rows columns colours"]:
    """Decode tile by tile.

    Tiles have one size: the last one of a row or column reaches back further where they do not fit evenly.

    Args:
        decoder: from latents to pixels, an integer factor larger in height and width; traced once, at the tile's size.
        latents: one picture, or frames, for each row of the batch.
        tile: height and width of what is decoded at a time, halos included, in latents.
        overlap: latents over which neighbours fade into each other.
        halo: latents of context that are decoded and cut off at every inner side of a tile.

    Returns:
        The whole picture, in the decoder's dtype.

    Raises:
        ValueError: `overlap` or `halo` is negative, tiles would not advance, or the decoder's factor is not whole.

    Example:
        >>> enlarge = lambda x: jnp.repeat(jnp.repeat(x, 8, axis=-3), 8, axis=-2)
        >>> decode(enlarge, jnp.ones((1, 20, 30, 4)), tile=(8, 16)).shape
        (1, 160, 240, 4)
    """
    if overlap < 0 or halo < 0:
        raise ValueError(f"overlap and halo must not be negative, got {overlap} and {halo}")
    sizes = (tile, tile) if isinstance(tile, int) else tile
    sizes = tuple(min(size, whole) for size, whole in zip(sizes, latents.shape[-3:-1], strict=True))
    shape = (*latents.shape[:-3], *sizes, latents.shape[-1])
    small = jax.eval_shape(decoder, jax.ShapeDtypeStruct(shape, latents.dtype))
    starts, weights, factors = [], [], []
    for whole, size, pixels in zip(latents.shape[-3:-1], sizes, small.shape[-3:-1], strict=True):
        if pixels % size:
            raise ValueError(f"decoder makes {pixels} pixels of {size} latents; the factor must be whole")
        factors.append(pixels // size)
        starts.append(_starts(whole, size, overlap + 2 * halo))
        weights.append(_weights(starts[-1], whole, size, overlap, halo, factors[-1]))
    corners = jnp.asarray(list(itertools.product(*starts)), jnp.int32)
    heights, widths = (jnp.asarray(each, jnp.float32) for each in weights)

    def step(out: Array, i: Array) -> tuple[Array, None]:
        at = [0] * (latents.ndim - 3) + [corners[i, 0], corners[i, 1], 0]
        part = decoder(lax.dynamic_slice(latents, _ints(at), shape)).astype(jnp.float32)
        part = part * heights[i // len(starts[1])][:, None, None] * widths[i % len(starts[1])][:, None]
        at = _ints([0] * (latents.ndim - 3) + [corners[i, 0] * factors[0], corners[i, 1] * factors[1], 0])
        held = lax.dynamic_slice(out, at, part.shape)
        return lax.dynamic_update_slice(out, held + part, at), None

    sides = (latents.shape[-3] * factors[0], latents.shape[-2] * factors[1])
    blank = jnp.zeros((*small.shape[:-3], *sides, small.shape[-1]), jnp.float32)
    return lax.scan(step, blank, jnp.arange(len(corners)))[0].astype(small.dtype)


def in_time(
    step: Callable[[PyTree[Any], Array], tuple[PyTree[Any], Array]],
    state: PyTree[Any],
    latents: Float[Array, "batch frames height width channels"],
    *,
    chunk: int,
) -> tuple[PyTree[Any], Float[Array, "batch more rows columns colours"]]:
    """Decode a video chunk by chunk of frames, with a causal decoder.

    Args:
        step: takes the state and a chunk of latent frames, gives the next state and the chunk's frames, as many for
            each latent frame. (Where the first one gives fewer, call `step` for it, and this for the others.)
        state: before the first frame.
        latents: of the whole video.
        chunk: latent frames at a time; what is left over is decoded as a shorter chunk.

    Returns:
        The state after the last frame, and all frames.

    Raises:
        ValueError: `chunk` is less than 1.

    Example:
        >>> add = lambda total, x: (total + x.sum(1), x)
        >>> in_time(add, jnp.zeros((1, 2, 2, 3)), jnp.ones((1, 5, 2, 2, 3)), chunk=2)[0][0, 0, 0]
        Array([5., 5., 5.], dtype=float32)
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    frames = latents.shape[1]
    chunk = min(chunk, frames)
    some = jax.eval_shape(step, state, latents[:, :chunk])[1]
    factor = some.shape[1] // max(chunk, 1)
    out = jnp.zeros((some.shape[0], frames * factor, *some.shape[2:]), some.dtype)

    def run(carry: tuple[Any, Array], first: Array, size: int) -> tuple[Any, Array]:
        state, part = step(carry[0], lax.dynamic_slice_in_dim(latents, first, size, axis=1))
        return state, lax.dynamic_update_slice_in_dim(carry[1], part, first * factor, axis=1)

    carry = (state, out)
    if chunk:
        firsts = jnp.arange(frames // chunk, dtype=jnp.int32) * chunk
        carry, _ = lax.scan(lambda carry, first: (run(carry, first, chunk), None), carry, firsts)
    left = frames % chunk if chunk else 0
    return run(carry, jnp.int32(frames - left), left) if left else carry


def _starts(whole: int, size: int, shared: int) -> list[int]:
    """Give where tiles start along one axis."""
    if size >= whole:
        return [0]
    if size <= shared:
        raise ValueError(f"tile must be larger than overlap + 2 halo = {shared} latents to advance, got {size}")
    count = -(-(whole - shared) // (size - shared))
    return [min(i * (size - shared), whole - size) for i in range(count)]


def _weights(starts: list[int], whole: int, size: int, overlap: int, halo: int, factor: int) -> np.ndarray:
    """Give the weight of each tile's pixels along one axis: 0 in the halo, then a ramp; they sum to 1."""
    pixel = np.arange(size * factor)
    weights = np.ones((len(starts), size * factor))
    total = np.zeros(whole * factor)
    for weight, start in zip(weights, starts, strict=True):
        for at_edge, depth in ((start == 0, pixel), (start + size == whole, pixel[::-1])):
            if not at_edge:
                weight *= np.clip((depth + 0.5 - halo * factor) / max(overlap * factor, 1e-9), 0, 1)
        total[start * factor : (start + size) * factor] += weight
    for weight, start in zip(weights, starts, strict=True):
        weight /= total[start * factor : (start + size) * factor]
    return weights


def _ints(at: list[Any]) -> tuple[Array, ...]:
    return tuple(jnp.asarray(i, jnp.int32) for i in at)
