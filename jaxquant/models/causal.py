"""Causal attention without a cache, which training and the uncompressed reference use."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

_QUERIES = 512  # attended at a time


def causal_attention(
    q: Float[Array, "batch tokens heads dim"],
    k: Float[Array, "batch tokens kv_heads dim"],
    v: Float[Array, "batch tokens kv_heads dim"],
    *,
    mask: Bool[Array, "batch tokens"] | None,
    scale: float,
    window: int | None,
) -> Float[Array, "batch tokens heads dim"]:
    """Attend without a cache, softmax in float32: what training and the uncompressed reference use.

    Queries of long rows come in blocks, and a gradient computes their scores again, so that memory grows with the
    tokens and not with their square.

    Args:
        q: queries.
        k: keys.
        v: values.
        mask: False marks padding, which no token sees.
        scale: multiplies the scores.
        window: how many tokens, itself included, a token sees; None sees all before it.

    >>> x = jnp.ones((1, 3, 2, 4))
    >>> causal_attention(x, x, x, mask=None, scale=0.5, window=None).shape
    (1, 3, 2, 4)
    """
    batch, tokens, heads, dim = q.shape
    grouped = q.reshape(batch, tokens, k.shape[2], heads // k.shape[2], dim)
    places = jnp.arange(tokens, dtype=jnp.int32)
    # The window counts real tokens alone, as it does over a cache, which stores no padding.
    rank = places[None] if mask is None else jnp.cumsum(mask, axis=1, dtype=jnp.int32)

    def attend(block: tuple[Array, Array]) -> Array:
        part, place = block  # [batch, queries, ...], [queries]; what is beyond the last token is dropped again
        scores = jnp.einsum("bqkgd,btkd->bkgqt", part, k, preferred_element_type=jnp.float32) * scale
        visible = (places[None, :] <= place[:, None])[None]
        if mask is not None:
            visible = visible & mask[:, None, :]
        if window is not None:
            distance = jnp.take(rank, place, axis=1, mode="clip")[:, :, None] - rank[:, None, :]
            visible = visible & (distance < window)
        # A finite floor keeps rows of padding, which see nothing, free of NaN.
        scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return jnp.einsum("bkgqt,btkd->bqkgd", weights, v)

    if tokens <= _QUERIES:
        return attend((grouped, places)).reshape(q.shape)
    blocks = -(-tokens // _QUERIES)
    rest = blocks * _QUERIES - tokens
    padded = jnp.pad(grouped, [(0, 0), (0, rest), (0, 0), (0, 0), (0, 0)])
    parts = jnp.moveaxis(padded.reshape(batch, blocks, _QUERIES, *grouped.shape[2:]), 1, 0)
    place = jnp.arange(blocks * _QUERIES, dtype=jnp.int32).reshape(blocks, _QUERIES)
    out = jax.lax.map(jax.checkpoint(attend), (parts, place))
    return jnp.moveaxis(out, 0, 1).reshape(batch, -1, heads, dim)[:, :tokens]
