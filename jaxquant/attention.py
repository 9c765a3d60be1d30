"""Attention over a packed cache: one token (`decode_attention`) or a chunk (`prefill_attention`) at a time.

Both read the same tokens in the same way. For a query at position p, the first `sinks` tokens and the newest `window`
tokens up to p are exact and every other token is decoded from its code, so that the result does not depend on how the
input was cut into chunks, unless `prefill_attention` is asked for more. Parts are joined by their log-sum-exp.
"""

from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from jaxquant import _attention
from jaxquant._kernels import cuda, flash, nvrtc, pallas, xla
from jaxquant._stacks import Index, KVCache, resolve
from jaxquant.cache import append
from jaxquant.protocols import Cache

Implementation = Literal["xla", "cuda", "pallas"]
PrefillImplementation = Literal["xla", "flash"]
Number = float | Float[Array, ""]


def decode_attention(
    q: Float[Array, "batch heads dim"],
    cache: KVCache,
    layer: Index,
    *,
    scale: Number | None = None,
    soft_cap: Number | None = None,
    sliding_window: int | Integer[Array, ""] | None = None,
    visible: Bool[Array, "batch capacity"] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "batch heads dim"], Float[Array, "batch heads"]]:
    """Attend from the newest token of every row to all tokens the cache holds.

    The cache is read as codes: nothing of it is decoded but one block of tokens at a time.

    Args:
        q: queries of the token appended last; `heads` is a multiple of the cache's kv_heads, and neighbouring query
            heads share a kv head.
        cache: after the `append` of that token.
        layer: a Python integer, or an integer array when it is not known at trace time.
        scale: of the scores before the softmax; dim**-0.5 if None.
        soft_cap: bound of the scores, `cap * tanh(score / cap)`.
        sliding_window: newest tokens that may be seen; all if None.
        visible: False hides the token at that position of the row.
        implementation: "xla" runs everywhere and is the reference; "cuda" is fused and needs an NVIDIA GPU; "pallas" is
            fused too, slower, and portable (it is interpreted on a CPU); None takes "cuda" where it can read this
            cache, and "xla" elsewhere.

    Returns:
        The output, in q's dtype, and the natural log of the sum of exponentials of the scores, in float32, by which
        outputs over different tokens can be merged. Rows without a visible token give 0 and -inf.

    Raises:
        ValueError: a shape does not fit the cache, an argument is out of range, or the implementation that was asked
            for cannot read this cache.

    Example:
        >>> import jax
        >>> from jaxquant import cache
        >>> from jaxquant.methods import turboquant
        >>> k, v = turboquant.kv(jax.random.key(0), dim=64, bits_k=4, bits_v=4)
        >>> c = cache.init(k, v, layers=1, batch=1, kv_heads=2, capacity=16)
        >>> c = cache.append(c, 0, jnp.ones((1, 3, 2, 64)), jnp.ones((1, 3, 2, 64)))
        >>> out, lse = decode_attention(jnp.ones((1, 8, 64)), c, 0)
        >>> out.shape, lse.shape
        ((1, 8, 64), (1, 8))
    """
    _check_queries("q", q, (cache.batch, "heads", cache.dim), heads_axis=1, cache=cache)
    rule = _rule(cache, scale, soft_cap, sliding_window, visible)
    return _attention.decode(cache, *resolve(cache, layer), q, rule, _choose(implementation, cache, q.shape[1], rule))


def prefill_attention(
    q: Float[Array, "batch new heads dim"],
    k: Float[Array, "batch new kv_heads dim"],
    v: Float[Array, "batch new kv_heads dim"],
    cache: KVCache,
    layer: Index,
    *,
    mask: Bool[Array, "batch new"] | None = None,
    scale: Number | None = None,
    soft_cap: Number | None = None,
    sliding_window: int | Integer[Array, ""] | None = None,
    visible: Bool[Array, "batch capacity"] | None = None,
    chunk: Literal["codes", "exact"] = "codes",
    implementation: PrefillImplementation | None = None,
) -> tuple[Float[Array, "batch new heads dim"], Float[Array, "batch new heads"], KVCache]:
    """Append a chunk of tokens to one layer and attend causally from each of them.

    Args:
        q: queries of the new tokens.
        k: their keys, after any position encoding.
        v: their values.
        cache: before the append.
        layer: a Python integer, or an integer array when it is not known at trace time.
        mask: False marks padding, anywhere in the row: it is not stored, nobody sees it, and its output is 0.
        scale: of the scores before the softmax; dim**-0.5 if None.
        soft_cap: bound of the scores, `cap * tanh(score / cap)`.
        sliding_window: newest tokens that may be seen, the query's own included; all if None.
        visible: False hides the token at that position of the row.
        chunk: how the chunk's own tokens are read: "codes" as decoding will read them, whatever the chunks were;
            "exact" as they are given, with the whole exact window before them, which is closer to attention without a
            cache, and depends on how the input was cut.
        implementation: "xla", which None takes, runs everywhere, in float32, and is the reference; "flash" decodes
            blocks of tokens to float16 for cuDNN's kernel, or for JAX's own attention where there is none. It is an
            experiment, right on an H200, and not compared with "xla" in speed there (docs/kernels.md).

    Returns:
        The output in q's dtype, the natural log-sum-exp of the scores in float32, and the cache after the append.

    Raises:
        ValueError: a shape does not fit the cache, an argument is out of range, or the implementation that was asked
            for cannot read this cache.

    Example:
        >>> import jax
        >>> from jaxquant import cache
        >>> from jaxquant.methods import turboquant
        >>> k, v = turboquant.kv(jax.random.key(0), dim=64, bits_k=4, bits_v=4)
        >>> c = cache.init(k, v, layers=1, batch=1, kv_heads=2, capacity=16)
        >>> x = jnp.ones((1, 3, 2, 64))
        >>> out, lse, c = prefill_attention(jnp.ones((1, 3, 8, 64)), x, x, c, 0)
        >>> out.shape, c.length
        ((1, 3, 8, 64), Array([[3]], dtype=int32))
    """
    after = append(cache, layer, k, v, mask=mask)
    _check_queries("q", q, (cache.batch, k.shape[1], "heads", cache.dim), heads_axis=2, cache=cache)
    span = int(sliding_window) if isinstance(sliding_window, int | np.integer) else None
    if span is not None and span >= cache.capacity:
        span = sliding_window = None
    rule = _rule(cache, scale, soft_cap, sliding_window, visible)
    if not q.shape[1]:
        return q, jnp.zeros(q.shape[:3], jnp.float32), after
    if chunk not in ("codes", "exact"):
        raise ValueError(f"chunk must be 'codes' or 'exact', got {chunk!r}")
    exact = chunk == "exact"
    chosen = _choose_prefill(implementation, cache, q.shape[1], rule, span, exact=exact)
    span = span if "flash" in chosen else None  # numbers that only rules need do not retrace
    out, lse = _attention.prefill(cache, after, *resolve(cache, layer), q, k, v, mask, rule, exact, chosen, span)
    return out, lse, after


def attend(
    q: Float[Array, "batch new heads dim"],
    k: Float[Array, "batch new kv_heads dim"],
    v: Float[Array, "batch new kv_heads dim"],
    cache: Cache,
    layer: Index,
    *,
    mask: Bool[Array, "batch new"] | None = None,
    scale: Number | None = None,
    soft_cap: Number | None = None,
    sliding_window: int | Integer[Array, ""] | None = None,
) -> tuple[Float[Array, "batch new heads dim"], Cache]:
    """Append tokens to one layer of any cache and attend causally from each of them: what decoders call.

    For a `KVCache` it is `prefill_attention`, or `append` and `decode_attention` for a single token. Any other cache
    does it in its own method `attend`, which takes q, k, v and layer, and the keywords of this function.

    Args:
        q: queries of the new tokens.
        k: their keys, after any position encoding.
        v: their values.
        cache: before the append.
        layer: a Python integer, or an integer array when it is not known at trace time.
        mask: False marks padding.
        scale: of the scores before the softmax; dim**-0.5 if None.
        soft_cap: bound of the scores.
        sliding_window: newest tokens that may be seen, the query's own included; all if None.

    Returns:
        The output in q's dtype, and the cache after the append.

    Raises:
        ValueError: a shape does not fit the cache, or an argument is out of range.

    Example:
        >>> from jaxquant import cache, quantizers
        >>> exact = quantizers.Exact(dim=64)
        >>> c = cache.init(exact, exact, layers=1, batch=1, kv_heads=2, capacity=16)
        >>> x = jnp.ones((1, 3, 2, 64))
        >>> out, c = attend(jnp.ones((1, 3, 8, 64)), x, x, c, 0)
        >>> out.shape
        (1, 3, 8, 64)
    """
    rule = {"scale": scale, "soft_cap": soft_cap, "sliding_window": sliding_window}
    if not isinstance(cache, KVCache):
        out, _, after = cache.attend(q, k, v, layer, mask=mask, **rule)  # pyright: ignore[reportAttributeAccessIssue]
    elif q.shape[1] == 1:
        after = append(cache, layer, k, v, mask=mask)
        out = decode_attention(q[:, 0], after, layer, **rule)[0][:, None]
    else:
        out, _, after = prefill_attention(q, k, v, cache, layer, mask=mask, **rule)
    return out, after


def merge(
    first: tuple[Float[Array, "*rows dim"], Float[Array, "*rows"]],
    second: tuple[Float[Array, "*rows dim"], Float[Array, "*rows"]],
) -> tuple[Float[Array, "*rows dim"], Float[Array, "*rows"]]:
    """Join two results (output, log-sum-exp) over disjoint sets of tokens into the result over all of them.

    Example:
        >>> out, lse = merge((jnp.array([1.0]), jnp.array(0.0)), (jnp.array([3.0]), jnp.array(0.0)))
        >>> out
        Array([2.], dtype=float32)
    """
    joined = xla.merge([xla.Partial(out.astype(jnp.float32), lse) for out, lse in (first, second)])
    return joined.out.astype(first[0].dtype), joined.lse


def _check_queries(name: str, q: Array, expected: tuple, *, heads_axis: int, cache: KVCache) -> None:
    fits = q.ndim == len(expected) and all(w == got for w, got in zip(expected, q.shape, strict=True) if w != "heads")
    if not fits:
        raise ValueError(f"{name} must have shape {list(expected)}, got {list(q.shape)}")
    if q.shape[heads_axis] % cache.kv_heads or not q.shape[heads_axis]:
        raise ValueError(
            f"heads of {name} must be a multiple of kv_heads = {cache.kv_heads}, got {q.shape[heads_axis]}"
        )


def _rule(cache: KVCache, scale: Any, soft_cap: Any, sliding_window: Any, visible: Array | None) -> xla.Rule:
    if visible is not None and visible.shape != (cache.batch, cache.capacity):
        raise ValueError(
            f"visible must have shape [batch, capacity] = {[cache.batch, cache.capacity]}, got {list(visible.shape)}"
        )
    return _attention.rule_of(cache.dim, scale, soft_cap, sliding_window, visible)


def _choose(implementation: Implementation | None, cache: KVCache, heads: int, rule: xla.Rule) -> tuple[str, ...]:
    """Give the implementation for each stack."""
    if implementation not in (None, *Implementation.__args__):
        raise ValueError(f"implementation must be None, 'xla', 'cuda' or 'pallas', got {implementation!r}")
    if implementation == "xla" or (implementation is None and not nvrtc.available()):
        return ("xla",) * len(cache.stacks)
    if implementation == "pallas":
        dealt = None if cache.spread is None else "its tokens are dealt out to devices"
        obstacles = [dealt or pallas.supports(stack) for stack in cache.stacks]
    else:
        obstacles = [cuda.unsupported(stack, heads // cache.kv_heads, rule, cache.spread) for stack in cache.stacks]
    if implementation is not None and all(obstacles):
        raise ValueError(f"implementation {implementation!r} cannot read this cache: {obstacles[0]}")
    return tuple("xla" if obstacle else implementation or "cuda" for obstacle in obstacles)


def _choose_prefill(
    implementation: PrefillImplementation | None,
    cache: KVCache,
    new: int,
    rule: xla.Rule,
    span: int | None,
    *,
    exact: bool,
) -> tuple[str, ...]:
    """Give the implementation for each stack."""
    if implementation not in (None, *PrefillImplementation.__args__):
        raise ValueError(f"implementation must be None, 'xla' or 'flash', got {implementation!r}")
    if implementation != "flash":
        return ("xla",) * len(cache.stacks)
    limits = {"exact": exact, "spread": cache.spread}
    obstacles = [flash.unsupported(stack, new, rule, span, **limits) for stack in cache.stacks]
    if all(obstacles):
        raise ValueError(f"implementation 'flash' cannot read this cache: {obstacles[0]}")
    return tuple("xla" if obstacle else "flash" for obstacle in obstacles)
