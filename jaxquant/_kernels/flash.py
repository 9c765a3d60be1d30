"""Prefill through a flash kernel: the coded past a block of decoded tokens at a time, the chunk's tokens by themselves.

On an NVIDIA GPU the kernel is cuDNN's; elsewhere JAX's own attention stands in for it, in float32, so that all that is
around it can be tested there. Operands are float16, which has three more bits than bfloat16, around powers of two that
are typical of the call's own queries and values. Queries are rotated once, and the output over coded tokens is restored
once. A causal kernel lets query i see keys j <= i, so that the keys of each row begin with the first that it may need,
and its queries are moved to where their newest key is.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxquant._kernels import nvrtc, xla
from jaxquant._kernels.xla import Partial, Rule
from jaxquant._spread import Spread
from jaxquant._stacks import Index, Stack, Store, code_shapes

BLOCK, BLOCK_BYTES = 8192, 2**26  # tokens of the past, and bytes of all rows, that are decoded at a time at most
DTYPE = "float16"


def unsupported(
    stack: Stack, new: int, rule: Rule, span: int | None, *, exact: bool, spread: Spread | None = None
) -> str | None:
    """Say why this path cannot read a stack, or return None where it can.

    Args:
        stack: the storage.
        new: tokens of the chunk.
        rule: of the attention.
        span: the sliding window, where it is known before tracing.
        exact: whether the chunk's own tokens are read as they are given.
        spread: how tokens are dealt out to devices.
    """
    if spread is not None:
        return "its tokens are dealt out to devices"
    if rule.visible is not None:
        return "`visible` is given"
    if rule.soft_cap is not None:
        return "`soft_cap` is given"
    if rule.sliding_window is not None and span is None:
        return "`sliding_window` is not known before tracing"
    if rule.sliding_window is not None and stack.window and not exact:
        return "`sliding_window` is given and the cache has an exact window"
    widths = sorted({stack.keys.quantizer.dim, *map(_width, (stack.keys, stack.values))})
    if len(widths) > 1:
        return f"vectors of {widths[0]} and of {widths[-1]} numbers are read"
    if span is not None and span > 8 * new:
        return f"`sliding_window` is {span}, more than 8 times the chunk's {new} tokens"
    capability = nvrtc.capability()
    most = 128 if capability is not None and capability < (9, 0) else 256
    if widths[0] > most or widths[0] % 8:
        return f"vectors of {widths[0]} numbers are read, not a multiple of 8 up to {most}"
    return None


def missing() -> str | None:
    """Say why cuDNN's kernel cannot run on this machine, or return None where it can."""
    capability = nvrtc.capability()
    if jax.default_backend() != "gpu" or capability is None:
        return "the default backend is not an NVIDIA GPU"
    if capability < (8, 0):
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, less than 8.0"
    try:
        _cudnn().check_cudnn_version()
    except (ImportError, AttributeError, RuntimeError) as problem:
        return f"cuDNN cannot be reached: {problem}"
    return None


def attend(
    stack: Stack,
    index: Index,
    q: Float[Array, "batch kv_heads rows dim"],
    v: Float[Array, "batch new kv_heads dim"],
    band: list[Float[Array, "batch kv_heads band dim"]],
    start: Int[Array, " batch"],
    count: Int[Array, " batch"],
    exact_from: Int[Array, " batch"],
    rule: Rule,
    *,
    exact: bool,
    span: int | None,
) -> list[Partial]:
    """Attend from the tokens of a chunk to all but the sinks.

    Args:
        stack: the storage after the append; `unsupported` returned None for it.
        index: of the layer within the stack.
        q: queries; rows are the heads that share a kv head, times the tokens.
        v: the tokens' values, of which the typical size counts.
        band: exact keys and values from `stack.window` tokens before the chunk to its end; empty where none are read.
        start: tokens before the chunk.
        count: tokens of the chunk; the rest is padding.
        exact_from: see `KVCache`.
        rule: see `Rule`.
        exact: whether the chunk's own tokens are read as they are given.
        span: newest tokens that may be seen.

    Returns:
        Attention over coded tokens and over exact ones.
    """
    new, window, sinks = v.shape[1], stack.window, stack.sinks
    position = start[:, None] + jnp.arange(new, dtype=jnp.int32)
    real = position < (start + count)[:, None]
    # Every token before `edge` is coded for all queries; from there on, a token is coded once the window has passed it.
    edge = jnp.maximum(jnp.maximum(start - window, exact_from), sinks)
    aligned = not window and not sinks  # the edge is the start
    q = q * rule.scale
    of_queries = _typical(q, jnp.tile(real, (1, q.shape[2] // new))[:, None])
    of_values = _typical(jnp.swapaxes(v, 1, 2).astype(jnp.float32), real[:, None])
    stores = (stack.keys, stack.values)
    keys, values = (store.at(index) for store in stores)

    def rows_of(q: Array) -> Array:
        return _narrow(q / of_queries).reshape(q.shape[0], -1, new, q.shape[-1])

    def part(rows: Array, pair: Sequence[Array], seen: Bool[Array, "batch new"], **mask: Any) -> Partial:
        k, v = pair
        out, lse = _moved(rows, _narrow(k * of_queries), _narrow(v / of_values), **mask)
        out = jnp.where(seen[:, None, :, None], out, 0.0).reshape(*q.shape[:3], -1)
        return Partial(out * of_values, jnp.where(seen[:, None], lse, -jnp.inf).reshape(q.shape[:3]))

    def decoded(first: Int[Array, " batch"], count: int) -> list[Array]:
        slot = jnp.clip(first[:, None] - sinks + jnp.arange(count, dtype=jnp.int32), 0, stack.slots - 1)
        return [x.expand(_taken(store, index, slot)) for x, store in zip((keys, values), stores, strict=True)]

    projected = rows_of(keys.project(q))
    nothing = Partial(jnp.zeros((*q.shape[:3], _width(stack.values)), jnp.float32), jnp.full(q.shape[:3], -jnp.inf))
    if span is None:
        size = _block(stack)
        last = stack.slots - size  # the last block begins there, and the one before it ends there

        def block(i: Int[Array, ""], carry: Partial) -> Partial:
            first, stop = jnp.minimum(i * size, last), jnp.minimum((i + 1) * size, last)
            stop = jnp.where((i + 1) * size < stack.slots, stop, stack.slots)
            held = jnp.clip(jnp.minimum(edge - sinks, stop) - first, 0, size)
            pair = [xla.expand(x, y, index, first, size) for x, y in zip((keys, values), stores, strict=True)]
            return xla.merge([carry, part(projected, pair, real & (held > 0)[:, None], lengths=held)])

        past = jnp.max(edge - sinks)
        blocks = jnp.where(past > last, -(-stack.slots // size), -(-past // size))
        coded = lax.fori_loop(0, blocks, block, nothing)
        if not exact:
            seen = real & (position - window >= edge[:, None])
            first = None if aligned else start - window - edge
            coded = xla.merge([coded, part(projected, decoded(edge, new), seen, causal=new, first=first)])
    else:
        base = jnp.maximum(start - span + 1, sinks)
        seen, held = real & (position >= base[:, None]), None
        if exact:
            held = jnp.maximum(edge - base, 0)
            seen &= (held > 0)[:, None] & (position - span < edge[:, None] - 1)
        coded, length = nothing, span - 1 + new
        held_tokens = span - 1 if exact else length
        if held_tokens:
            mask = {"causal": length, "first": start - base, "span": span, "lengths": held}
            coded = part(projected, decoded(base, held_tokens), seen, **mask)
    parts = [Partial(values.restore(coded.out), coded.lse)]
    if band:
        seen, first = real & (position >= edge[:, None]), None
        if not aligned:
            at = (edge - start + window)[:, None] + jnp.arange(window + new, dtype=jnp.int32)
            at = jnp.clip(at, 0, window + new - 1)[:, None, :, None]
            band, first = [jnp.take_along_axis(x, at, axis=2) for x in band], start - edge
        pair = [jnp.nan_to_num(x.astype(jnp.float32)) for x in band]
        parts.append(part(rows_of(q), pair, seen, causal=window + new, first=first, span=span if exact else window))
    return parts


def _moved(
    q: Float[Array, "batch heads new dim"],
    k: Float[Array, "batch kv_heads tokens dim"],
    v: Float[Array, "batch kv_heads tokens dim"],
    *,
    causal: int | None = None,
    first: Int[Array, " batch"] | None = None,
    span: int | None = None,
    lengths: Int[Array, " batch"] | None = None,
) -> tuple[Float[Array, "batch heads new dim"], Float[Array, "batch heads new"]]:
    """Call the kernel, for `causal` queries of which the chunk's begin at `first`; None sees all keys."""
    if first is None:
        return kernel(q, k, v, causal=causal is not None, span=span, lengths=lengths)
    assert causal is not None
    from_chunk = jnp.arange(causal, dtype=jnp.int32) - first[:, None]
    to_chunk = jnp.arange(q.shape[2], dtype=jnp.int32) + first[:, None]
    q = jnp.take_along_axis(q, jnp.clip(from_chunk, 0, q.shape[2] - 1)[:, None, :, None], axis=2)
    out, lse = kernel(q, k, v, causal=True, span=span, lengths=lengths)
    back = jnp.clip(to_chunk, 0, causal - 1)[:, None]
    return jnp.take_along_axis(out, back[..., None], axis=2), jnp.take_along_axis(lse, back, axis=2)


def kernel(
    q: Array, k: Array, v: Array, *, causal: bool, span: int | None, lengths: Int[Array, " batch"] | None
) -> tuple[Float[Array, "batch heads new dim"], Float[Array, "batch heads new"]]:
    """Attend: query i sees keys j < `lengths` and, where causal, i - `span` < j <= i.

    The result, in float32, is undefined for a query that sees none.
    """
    if missing() is not None:
        q, k, v = (jnp.swapaxes(x, 1, 2).astype(jnp.float32) for x in (q, k, v))
        with jax.numpy_dtype_promotion("standard"):  # which JAX's own attention relies on
            out, lse = jax.nn.dot_product_attention(
                *(q, k, v),
                scale=1.0,
                is_causal=causal,
                key_value_seq_lengths=lengths,
                local_window_size=None if span is None else (span - 1, 0),
                implementation="xla",
                return_residual=True,
            )
        return jnp.swapaxes(out, 1, 2), jnp.swapaxes(lse, 1, 2)
    cudnn = _cudnn()
    masks = cudnn.MaskType
    kind = (masks.NO_MASK, masks.CAUSAL) if lengths is None else (masks.PADDING, masks.PADDING_CAUSAL)
    queries = None if lengths is None else jnp.full(q.shape[0], q.shape[2], jnp.int32)
    with jax.numpy_dtype_promotion("standard"):
        out, lse = cudnn.dot_product_attention(
            *(q, k, v),
            q_seqlen=queries,
            kv_seqlen=lengths,
            scale=1.0,
            mask_type=kind[causal],
            qkv_layout="BNTH",
            sliding_window_length=span,
            return_residual=True,
        )
    return out.astype(jnp.float32), lse.astype(jnp.float32)


def _cudnn() -> Any:
    """Give JAX's interface to cuDNN: `jax.nn.dot_product_attention` rounds the log-sum-exp to the queries' dtype."""
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo


def _typical(
    x: Float[Array, "batch kv_heads rows dim"], real: Bool[Array, "batch 1 rows"]
) -> Float[Array, "batch kv_heads 1 1"]:
    """Give a power of two near the geometric mean of the vectors' largest numbers, which no single vector moves far."""
    peak = jnp.max(jnp.abs(x), axis=-1)
    counts = real & (peak > 0) & jnp.isfinite(peak)
    mean = jnp.nan_to_num(jnp.mean(jnp.log2(jnp.where(counts, peak, 1.0)), axis=2, where=counts))
    return jnp.ldexp(jnp.float32(1), jnp.clip(jnp.round(mean), -60, 60).astype(jnp.int32))[..., None, None]


def _narrow(x: Array) -> Array:
    limit = float(jnp.finfo(DTYPE).max)
    return jnp.clip(x, -limit, limit).astype(DTYPE)


def _taken(store: Store, index: Index, slot: Int[Array, "batch tokens"]) -> PyTree[Array]:
    """Take codes of each row's own slots, without slicing the layer out."""
    rows = jnp.arange(slot.shape[0], dtype=jnp.int32)[:, None]
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf[index, rows, :, slot], 1, 2), store.codes)


def _block(stack: Stack) -> int:
    batch, kv_heads = stack.keys.sinks.shape[1:3]
    each = batch * kv_heads * (_width(stack.keys) + _width(stack.values)) * jnp.dtype(DTYPE).itemsize
    return min(stack.slots, BLOCK, max(512, BLOCK_BYTES // each // 128 * 128))


def _width(store: Store) -> int:
    """Count the numbers of a vector as it is read: dim, or more."""
    code = code_shapes(store.quantizer, (1, 1, 1))
    return jax.eval_shape(lambda code: store.at(0).expand(code), code).shape[-1]
