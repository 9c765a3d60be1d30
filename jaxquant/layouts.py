"""From the layouts of model families to the arrays that attention here takes, and back: pure functions.

Attention takes queries [batch, tokens, heads, dim], and keys and values [batch, tokens, kv_heads, dim]. Every family
comes here with what its projections give, and leaves with `merged` or `heads_first`:

* language models as Hugging Face's attention functions see them, heads first: `heads_first` both ways;
* DiT, one fused projection [batch, tokens, 3 heads dim]: `from_fused`;
* WAN's video transformer, separate projections: normalised over all heads together, split, and rotated by frame, row
  and column: `from_wan`. Its attention to the text is `from_flat`, without rotation.

`heads_of` reads how many heads of what size there are from a model's configuration.

References:
    W. Peebles, S. Xie, "Scalable diffusion models with transformers", arXiv:2212.09748.
    Team Wan, "Wan: Open and advanced large-scale video generative models", arXiv:2503.20314.
    J. Su, Y. Lu, S. Pan, A. Murtadha, B. Wen, Y. Liu, "RoFormer: Enhanced transformer with rotary position embedding",
    arXiv:2104.09864.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

Triple = tuple[Array, Array, Array]


class Heads(NamedTuple):
    """The size of a model's self-attention."""

    layers: int
    heads: int
    kv_heads: int
    dim: int


def heads_of(config: Mapping[str, Any]) -> Heads:
    """Read the size of self-attention from a configuration: of Hugging Face, diffusers, DiT or WAN.

    Args:
        config: the contents of a config.json.

    Raises:
        ValueError: it is of none of these.

    Example:
        >>> heads_of({"num_layers": 30, "num_attention_heads": 12, "attention_head_dim": 128})
        Heads(layers=30, heads=12, kv_heads=12, dim=128)
    """
    get = config.get
    layers = get("num_hidden_layers") or get("num_layers") or get("depth")
    heads = get("num_attention_heads") or get("num_heads")
    width = get("hidden_size") or get("dim")
    dim = get("head_dim") or get("attention_head_dim") or (width // heads if width and heads else None)
    if not (layers and heads and dim):
        known = ", ".join(sorted(config)) or "nothing"
        raise ValueError(f"config must name layers, heads and their size; it has {known}")
    return Heads(layers, heads, get("num_key_value_heads") or heads, dim)


def heads_first(x: Float[Array, "batch heads tokens dim"]) -> Float[Array, "batch tokens heads dim"]:
    """Swap the axes of heads and tokens; its own inverse.

    Example:
        >>> heads_first(jnp.zeros((1, 8, 100, 64))).shape
        (1, 100, 8, 64)
    """
    return jnp.swapaxes(x, 1, 2)


def merged(x: Float[Array, "batch tokens heads dim"]) -> Float[Array, "batch tokens width"]:
    """Put the heads of an output side by side, for the projection after it.

    Example:
        >>> merged(jnp.zeros((1, 100, 8, 64))).shape
        (1, 100, 512)
    """
    return x.reshape(*x.shape[:2], -1)


def from_flat(x: Float[Array, "batch tokens width"], *, heads: int) -> Float[Array, "batch tokens heads dim"]:
    """Split what a projection gave into heads; the inverse of `merged`.

    Args:
        x: queries, keys or values.
        heads: heads of x: of keys and values, kv heads.

    Raises:
        ValueError: the width is not a multiple of `heads`.

    Example:
        >>> from_flat(jnp.zeros((1, 100, 512)), heads=8).shape
        (1, 100, 8, 64)
    """
    if heads < 1 or x.shape[2] % heads:
        raise ValueError(f"x has width {x.shape[2]}, which {heads} heads do not divide")
    return x.reshape(*x.shape[:2], heads, -1)


def from_fused(x: Float[Array, "batch tokens width"], *, heads: int, kv_heads: int | None = None) -> Triple:
    """Split one fused projection into queries, keys and values: all queries first, then all keys, then all values.

    Args:
        x: of width (heads + 2 kv_heads) dim.
        heads: of queries.
        kv_heads: of keys and values; `heads` if None.

    Raises:
        ValueError: the width does not fit.

    Example:
        >>> [part.shape for part in from_fused(jnp.zeros((1, 100, 3 * 512)), heads=8)]
        [(1, 100, 8, 64), (1, 100, 8, 64), (1, 100, 8, 64)]
    """
    kv_heads = heads if kv_heads is None else kv_heads
    if min(heads, kv_heads) < 1 or x.shape[2] % (heads + 2 * kv_heads):
        raise ValueError(f"x has width {x.shape[2]}, which {heads} + 2 * {kv_heads} heads do not divide")
    q, k, v = jnp.split(from_flat(x, heads=heads + 2 * kv_heads), [heads, heads + kv_heads], axis=2)
    return q, k, v


def from_wan(
    q: Float[Array, "batch tokens width"],
    k: Float[Array, "batch tokens width"],
    v: Float[Array, "batch tokens width"],
    q_weight: Float[Array, " width"],
    k_weight: Float[Array, " width"],
    *,
    heads: int,
    grid: tuple[int, int, int],
    theta: float = 10_000.0,
    epsilon: float = 1e-6,
) -> Triple:
    """Normalise, split and rotate the projections of WAN's self-attention.

    Args:
        q: queries, tokens in the order of `grid`, columns fastest.
        k: keys.
        v: values, which are only split.
        q_weight: of the root-mean-square normalisation over all heads of the queries.
        k_weight: of the keys.
        heads: of all three.
        grid: frames, rows and columns of the tokens.
        theta: base of the rotation's wavelengths.
        epsilon: added to the mean square.

    Raises:
        ValueError: the grid does not hold the tokens, or heads do not divide the width.

    Example:
        >>> x = jnp.ones((1, 24, 128))
        >>> q, k, v = from_wan(x, x, x, jnp.ones(128), jnp.ones(128), heads=2, grid=(2, 3, 4))
        >>> q.shape
        (1, 24, 2, 64)
    """
    if int(np.prod(grid)) != q.shape[1]:
        raise ValueError(f"grid {grid} has {int(np.prod(grid))} places for {q.shape[1]} tokens")
    q, k, v = (
        from_flat(x, heads=heads) for x in (_normalized(q, q_weight, epsilon), _normalized(k, k_weight, epsilon), v)
    )
    angles = jnp.asarray(wan_angles(grid, q.shape[3], theta=theta), jnp.float32)
    return _turned(q, angles), _turned(k, angles), v


def wan_angles(grid: tuple[int, int, int], dim: int, *, theta: float = 10_000.0) -> np.ndarray:
    """Give the angle of every token and pair of neighbouring coordinates: the first pairs turn with the frame.

    Of dim coordinates, 2 (dim // 6) turn with the row, as many with the column, and the others with the frame.

    Args:
        grid: frames, rows and columns.
        dim: of a head, even.
        theta: base of the wavelengths.

    Raises:
        ValueError: `dim` is odd.

    Example:
        >>> wan_angles((2, 1, 1), 8)[1].round(3)  # 4 coordinates for the frame, 2 each for row and column
        array([1.  , 0.01, 0.  , 0.  ])
    """
    if dim % 2:
        raise ValueError(f"dim must be even, got {dim}")
    side = 2 * (dim // 6)
    places = np.indices(grid).reshape(3, -1)
    parts = [
        place[:, None] * theta ** -(np.arange(0, share, 2) / max(share, 1))
        for place, share in zip(places, (dim - 2 * side, side, side), strict=True)
    ]
    return np.concatenate(parts, axis=1)


def _normalized(x: Array, weight: Array, epsilon: float) -> Array:
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return (wide * weight.astype(jnp.float32)).astype(x.dtype)


def _turned(x: Float[Array, "batch tokens heads dim"], angles: Float[Array, "tokens pairs"]) -> Array:
    """Turn each pair of neighbouring coordinates."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:3], -1, 2)
    cos, sin = (f(angles)[:, None] for f in (jnp.cos, jnp.sin))
    first, second = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
