"""Uncompressed caches of `transformers` from and to a `KVCache`: for caches that move between PyTorch and JAX.

Needs the extra `torch`.
"""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch
from jaxtyping import Array
from transformers import DynamicCache

from jaxquant import cache as caches
from jaxquant.cache import KVCache
from jaxquant.quantizers import Exact

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def from_transformers(
    cache: DynamicCache, *, capacity: int, mask: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> KVCache:
    """Copy a `DynamicCache` into a cache that does not compress.

    Args:
        cache: with every token in every layer: no sliding window.
        capacity: most tokens a row can hold.
        mask: `attention_mask` [batch, tokens] of what the cache holds; padding is left out.
        dtype: to hold the numbers in; their own by default, which loses nothing.

    Raises:
        ValueError: the cache is empty, its layers hold different numbers of tokens, or its dtype is another one.

    Example:
        >>> old = DynamicCache()
        >>> _ = old.update(torch.ones(1, 2, 5, 64), torch.ones(1, 2, 5, 64), 0)
        >>> from_transformers(old, capacity=16, dtype=torch.bfloat16).length
        Array([[5]], dtype=int32)
    """
    layers = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
    if not layers or any(x is None for pair in layers for x in pair):
        raise ValueError("cache must hold tokens in every layer")
    first = layers[0][0]
    assert first is not None
    if len({tuple(x.shape) for pair in layers for x in pair if x is not None}) > 1:
        raise ValueError("cache must hold the same tokens in every layer, as one without sliding windows does")
    batch, kv_heads, tokens, dim = first.shape
    kept = first.dtype if dtype is None else dtype
    if kept not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, _DTYPES))}, got {kept}")
    exact = Exact(dim=dim, dtype=_DTYPES[kept])  # pyright: ignore[reportArgumentType]
    held = caches.init(
        exact, exact, layers=len(layers), batch=batch, kv_heads=kv_heads, capacity=capacity, dtype=_DTYPES[kept]
    )
    if mask is not None and tuple(mask.shape) != (batch, tokens):
        raise ValueError(f"mask must be [batch, tokens] = {[batch, tokens]}, got {list(mask.shape)}")
    if tokens > capacity:
        raise ValueError(f"capacity must be at least the cache's {tokens} tokens, got {capacity}")
    valid = None if mask is None else jnp.asarray(mask.cpu().numpy() != 0)
    for layer, pair in enumerate(layers):
        k, v = (jnp.asarray(_numpy(x.to(kept).transpose(1, 2))) for x in pair if x is not None)
        held = caches.append(held, layer, k, v, mask=valid)
    return held


def to_transformers(
    cache: KVCache, *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[DynamicCache, torch.Tensor]:
    """Copy a cache, decoded if it compresses, into a `DynamicCache`.

    Rows that are shorter than the longest are padded on the left, as `transformers` expects.

    Args:
        cache: to copy.
        dtype: of the model that continues; numbers kept in 16 bits are the same in float32.
        device: of the model that continues.

    Returns:
        The cache, and the `attention_mask` [batch, tokens] of what it holds.

    Raises:
        ValueError: the layers hold different numbers of tokens.

    Example:
        >>> from jaxquant import cache
        >>> exact = Exact(dim=64)
        >>> held = cache.init(exact, exact, layers=1, batch=1, kv_heads=2, capacity=16)
        >>> held = cache.append(held, 0, jnp.ones((1, 5, 2, 64)), jnp.ones((1, 5, 2, 64)))
        >>> new, mask = to_transformers(held, dtype=torch.bfloat16)
        >>> new.get_seq_length(), mask.shape
        (5, torch.Size([1, 5]))
    """
    length = np.asarray(cache.length)
    if (length != length[0]).any():
        raise ValueError("cache must hold the same tokens in every layer")
    tokens = int(length.max())
    place = np.arange(tokens)[None] - (tokens - length[0][:, None])  # of the token at each padded position
    made = DynamicCache()
    for layer in range(cache.layers):
        parts = []
        for x in caches.materialize(cache, layer):
            padded = np.take_along_axis(np.asarray(x), np.maximum(place, 0)[:, :, None, None], axis=1)
            padded = np.where(place[:, :, None, None] >= 0, padded, np.float32(0))
            parts.append(torch.from_numpy(padded).transpose(1, 2).to(device=device, dtype=dtype).contiguous())
        made.update(*parts, layer)
    return made, torch.from_numpy((place >= 0).astype(np.int64)).to(device)


def _numpy(x: torch.Tensor) -> np.ndarray | Array:
    x = x.detach().cpu().contiguous()
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()
