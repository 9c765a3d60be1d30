"""Attention over plain arrays in chunks of queries and keys: every kind of mask, and memory bounded by the chunks.

Scores exist for one chunk of queries and one chunk of keys at a time, in the forward and in the backward pass, which
computes them again from the log of the sum of exponentials. Chunks that causality or a sliding window hides from every
query of a chunk are not visited.

References:
    M. N. Rabe, C. Staats, "Self-attention does not need O(n^2) memory", arXiv:2112.05682.
    T. Dao, D. Y. Fu, S. Ermon, A. Rudra, C. Ré, "FlashAttention: Fast and memory-efficient exact attention with
    IO-awareness", arXiv:2205.14135, algorithms 1 and 4.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from jaxquant._kernels import chunks

Number = float | Float[Array, ""]
Positions = int | Integer[Array, ""] | Integer[Array, " batch"]


def chunked_attention(
    q: Float[Array, "batch queries heads dim"],
    k: Float[Array, "batch keys kv_heads dim"],
    v: Float[Array, "batch keys kv_heads width"],
    *,
    causal: bool = False,
    offset: Positions = 0,
    sliding_window: int | Integer[Array, ""] | None = None,
    prefix: Positions | None = None,
    q_mask: Bool[Array, "batch queries"] | None = None,
    kv_mask: Bool[Array, "batch keys"] | None = None,
    segments: tuple[Integer[Array, "batch queries"], Integer[Array, "batch keys"]] | None = None,
    mask: Bool[Array, "#batch #heads #queries #keys"] | None = None,
    bias: Float[Array, "#batch #heads #queries #keys"] | None = None,
    scale: Number | None = None,
    soft_cap: Number | None = None,
    q_chunk: int = 256,
    kv_chunk: int = 512,
) -> tuple[Float[Array, "batch queries heads width"], Float[Array, "batch queries heads"]]:
    """Attend, a chunk of queries and a chunk of keys at a time.

    A key is seen if nothing hides it: all masks apply together. Scores are `cap tanh(scale <q, k> / cap) + bias`.
    Reverse-mode derivatives exist for q, k, v, bias, scale and soft_cap.

    Args:
        q: queries; `heads` is a multiple of `kv_heads`, and neighbouring query heads share a kv head.
        k: keys.
        v: values.
        causal: a query at position p sees keys up to p.
        offset: position of the first query among the keys, for each row or for all.
        sliding_window: a query sees keys less than this far away, on both sides unless causal.
        prefix: first keys that causality does not hide; the other masks still do.
        q_mask: False marks padding, which may hold anything: its output is 0.
        kv_mask: False marks padding, which may hold anything: it is read as zeros, and seen by nobody.
        segments: a query sees the keys with its own number.
        mask: False hides.
        bias: added to scores; -inf hides.
        scale: of the scores before the softmax; dim**-0.5 if None.
        soft_cap: bound of the scores.
        q_chunk: queries at a time.
        kv_chunk: keys at a time.

    Returns:
        The output in q's dtype, and the natural log of the sum of exponentials of the scores, in float32 or wider.
        Rows that see nothing give 0 and -inf.

    Raises:
        ValueError: a shape does not fit, or an argument is out of range.
        TypeError: q, k and v differ in dtype.

    Example:
        >>> q, k = jnp.ones((1, 1000, 8, 16)), jnp.ones((1, 1000, 2, 16))
        >>> out, lse = chunked_attention(q, k, k, causal=True, sliding_window=100)
        >>> out.shape, lse.shape
        ((1, 1000, 8, 16), (1, 1000, 8))
    """
    _check(q, k, v, q_mask, kv_mask, segments, mask, bias)
    for name, value in (("q_chunk", q_chunk), ("kv_chunk", kv_chunk), ("sliding_window", sliding_window)):
        if isinstance(value, int | np.integer) and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if isinstance(soft_cap, int | float | np.number) and not soft_cap > 0:
        raise ValueError(f"soft_cap must be positive, got {soft_cap}")
    batch, queries = q.shape[:2]
    wide = q.dtype if q.dtype == jnp.float64 else jnp.float32

    def rows(positions: Positions) -> Int[Array, " batch"]:
        return jnp.broadcast_to(jnp.asarray(positions, jnp.int32), (batch,))

    hiding = chunks.Hiding(
        offset=rows(offset),
        # Far beyond any length, and small enough that positions can be added to it.
        window=None if sliding_window is None else jnp.minimum(sliding_window, 2**30).astype(jnp.int32),
        prefix=None if prefix is None else rows(prefix),
        q_mask=q_mask,
        kv_mask=kv_mask,
        segments=segments,
        mask=mask,
    )
    smooth = chunks.Smooth(
        scale=jnp.asarray(q.shape[3] ** -0.5 if scale is None else scale, wide),
        soft_cap=None if soft_cap is None else jnp.asarray(soft_cap, wide),
        bias=bias,
    )
    if not q.size or not k.shape[1]:
        shape = (*q.shape[:3], v.shape[3])
        return jnp.zeros(shape, q.dtype), jnp.full(shape[:3], -jnp.inf, wide)
    static = chunks.Static(causal=causal, q_chunk=min(q_chunk, queries), kv_chunk=min(kv_chunk, k.shape[1]))
    return chunks.attend(static, q, k, v, smooth, hiding)


def _check(q: Array, k: Array, v: Array, q_mask, kv_mask, segments, mask, bias) -> None:
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    batch, queries, heads, dim = q.shape
    kv_heads = k.shape[2]
    if k.shape[:3] != v.shape[:3] or k.shape[0] != batch or k.shape[3] != dim:
        raise ValueError(f"q, k and v do not fit each other: {q.shape}, {k.shape} and {v.shape}")
    if not kv_heads or not heads or heads % kv_heads:
        raise ValueError(f"heads of q must be a multiple of the {kv_heads} of k, got {heads}")
    of_q, of_k = segments or (None, None)
    full = (batch, heads, queries, k.shape[1])
    for name, x, expected, broadcast in (
        ("q_mask", q_mask, full[0::2], False), ("kv_mask", kv_mask, full[0::3], False),
        ("segments[0]", of_q, full[0::2], False), ("segments[1]", of_k, full[0::3], False),
        ("mask", mask, full, True), ("bias", bias, full, True),
    ):  # fmt: skip
        if x is None:
            continue
        fits = x.ndim == len(expected) and all(
            got == want or (broadcast and got == 1) for got, want in zip(x.shape, expected, strict=True)
        )
        if not fits:
            ones = ", or 1 in place of any" if broadcast else ""
            raise ValueError(f"{name} must have shape {list(expected)}{ones}, got {list(x.shape)}")
