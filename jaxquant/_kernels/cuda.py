"""Fused decode attention for NVIDIA GPUs, from compute capability 8.0 on.

The kernels are CUDA C++ in `sources/`, compiled for the shapes at hand when they are first traced. `decode` reads the
stacked buffers in place: the layer, the lengths and the settings are operands in device memory, so that nothing is
sliced, copied or synchronized. Where rows are split, `combine` joins their parts. `docs/kernels.md` has the design and
what it reaches.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxquant._kernels import cuda_blocks, nvrtc
from jaxquant._kernels.cuda_formats import DTYPES, book, levels, pair_window, rounds, signs, unreadable, width
from jaxquant._kernels.xla import Partial, Rule
from jaxquant._spread import Spread
from jaxquant._stacks import Index, Stack
from jaxquant.protocols import Quantizer
from jaxquant.quantizers import Quantized, Scalar
from jaxquant.trellis import Trellis


def unsupported(stack: Stack, heads: int, rule: Rule, spread: Spread | None = None) -> str | None:
    """Say why these kernels cannot read a stack, or return None where they can.

    Args:
        stack: the storage.
        heads: query heads that share a kv head.
        rule: of the attention.
        spread: how tokens are dealt out to devices.
    """
    if spread is not None and rule.sliding_window is not None:
        return "tokens are dealt out to devices and `sliding_window` is given"
    for name, store in {"keys": stack.keys, "values": stack.values}.items():
        obstacle = unreadable(store.quantizer)
        if obstacle is not None:
            return f"{name} {obstacle}"
    if not 1 <= heads <= 16:
        return f"{heads} query heads share a kv head, more than 16"
    if stack.slots < cuda_blocks.TILE:
        return f"there is room for {stack.slots} coded tokens, fewer than {cuda_blocks.TILE}"
    if rule.visible is not None:
        return "`visible` is given"
    return None


def coded(
    stack: Stack,
    index: Index,
    q: Float[Array, "batch heads dim"],
    layer: Index,
    length: Int[Array, "layers batch"],
    exact_from: Int[Array, "layers batch"],
    rule: Rule,
    spread: Spread | None = None,
) -> Partial:
    """Attend from the newest token of every row to the coded tokens, or to those that a `spread` deals to this device.

    Args:
        stack: the storage; `unsupported` returned None for it.
        index: of the layer within the stack.
        q: queries, in any of the float dtypes.
        layer: of the lengths.
        length: tokens held.
        exact_from: see `KVCache`.
        rule: see `Rule`.
        spread: how tokens are dealt out to devices.

    Returns:
        The output in q's dtype, [batch, kv_heads, heads / kv_heads, dim], and its log-sum-exp.
    """
    sinks, window = stack.sinks, stack.window
    if spread is not None:  # what is to be read of this device's slots, as if it were a row of its own
        coded = jnp.minimum(jnp.maximum(length[layer] - window, exact_from[layer]), length[layer]) - sinks
        length, layer, sinks, window = spread.before(coded)[None], 0, 0, 0
        exact_from = jnp.zeros_like(length)
    return attend(
        (stack.keys.at(index), stack.values.at(index)),
        (stack.keys.codes, stack.values.codes),
        *(q, layer, length, exact_from, rule),
        index=index,
        sinks=sinks,
        window=window,
        together=spread is not None,
    )


def attend(
    quantizers: tuple[Quantizer, Quantizer],
    codes: tuple[Quantized, Quantized],
    q: Float[Array, "batch heads dim"],
    layer: Index,
    length: Int[Array, "layers batch"],
    exact_from: Int[Array, "layers batch"],
    rule: Rule,
    *,
    index: Index = 0,
    sinks: int = 0,
    window: int = 0,
    table: Int[Array, "batch row_pages"] | None = None,
    together: bool = False,
) -> Partial:
    """Attend to keys and values in stacked buffers or, given a `table`, in pages [pages, kv_heads, page, ...].

    `together` writes outputs and log-sum-exps into one array where that can be, which then travels as it is.
    """
    keys, values = quantizers
    assert isinstance(keys, Scalar | Trellis)
    assert isinstance(values, Scalar | Trellis)
    batch = q.shape[0]
    if table is None:
        layers, _, kv_heads, slots = codes[0].codes.shape[:4]
        page = 0
    else:
        layers, kv_heads, page = codes[0].codes.shape[:3]
        slots = page * table.shape[1]
    heads, dim = q.shape[1] // kv_heads, q.shape[2]
    key_rounds, value_rounds = rounds(keys), rounds(values)
    dtype = q.dtype.name
    asked = q.dtype
    if key_rounds is None:
        q = keys.project(q)
        dtype = "float32"
    if value_rounds is None:
        dtype = "float32"
        q = q.astype(dtype)
    together = together and dtype == "float32" and value_rounds is not None
    windows = pair_window(keys), pair_window(values)
    bits, scales = (width(keys), width(values)), (keys.scale_dtype, values.scale_dtype)
    wide = cuda_blocks.wide(batch * kv_heads, slots, page)
    capability = nvrtc.capability() or (9, 0)
    shape = cuda_blocks.shape(dim, heads, _vector(dim, bits, scales), windows, capability, wide=wide)
    passes = -(-heads // shape.columns)
    parts = cuda_blocks.parts(batch * kv_heads * passes, slots, shape)
    decode, combine = kernels(
        dim=dim,
        heads=heads,
        bits=bits,
        books=(str(book(keys)), str(book(values))),
        scales=scales,
        queries=dtype,
        rounds=(key_rounds or 0, value_rounds or 0),
        soft_cap=rule.soft_cap is not None,
        sliding=rule.sliding_window is not None,
        even=slots % 8 == 0,
        wide=wide,
        page=page,
        whole=parts == 1,
        together=together,
        windows=windows,
        capability=capability,
    )
    nothing = jnp.zeros((), jnp.float32)
    results = [
        jax.ShapeDtypeStruct((batch, kv_heads, heads, dim + together), dtype),
        jax.ShapeDtypeStruct((1,) if together else (batch, kv_heads, heads), jnp.float32),
    ]
    partial, sums, out, lse = decode(
        [
            q,
            jnp.asarray(layer, jnp.int32),
            jnp.asarray(index, jnp.int32),
            length,
            exact_from,
            rule.scale,
            nothing if rule.soft_cap is None else rule.soft_cap,
            jnp.zeros((), jnp.int32) if rule.sliding_window is None else rule.sliding_window,
            jnp.zeros((), jnp.int32) if table is None else table,
            *_operands(codes[0], keys),
            signs(keys),
            *_operands(codes[1], values),
            signs(values),
        ],
        [layers, batch, kv_heads, slots, sinks, window, length.shape[0]],
        [
            jax.ShapeDtypeStruct((batch * kv_heads * heads, parts, dim), jnp.float32),
            jax.ShapeDtypeStruct((batch * kv_heads * heads, parts, 2), jnp.float32),
            *(results if parts == 1 else [jax.ShapeDtypeStruct((1,), jnp.float32)] * 2),
        ],
        grid=(batch * kv_heads * passes, parts),
    )
    if parts > 1:
        out, lse = combine([partial, sums, signs(values)], [parts], results, grid=(batch * kv_heads * heads, 1))
    if together:
        out, lse = out[..., :-1], out[..., -1]
    if value_rounds is None:
        out = values.restore(out)
    return Partial(out.astype(asked), lse)


def _operands(code: Quantized, quantizer: Scalar | Trellis) -> list[Array]:
    assert code.scales is not None
    return [code.codes, code.scales, levels(quantizer)]


def _vector(dim: int, bits: tuple[int, int], scales: tuple[str, str]) -> int:
    """Count the bytes of a key, a value and their scales."""
    return sum(dim * each // 8 + jnp.dtype(scale).itemsize for each, scale in zip(bits, scales, strict=True))


@functools.cache
def kernels(
    *,
    dim: int,
    heads: int,
    bits: tuple[int, int],
    books: tuple[str, str],
    scales: tuple[str, str],
    queries: str,
    rounds: tuple[int, int],
    soft_cap: bool,
    sliding: bool,
    even: bool,
    wide: bool,
    capability: tuple[int, int],
    page: int = 0,
    whole: bool = False,
    together: bool = False,
    windows: tuple[int, int] = (0, 0),
) -> tuple[nvrtc.Kernel, nvrtc.Kernel]:
    """Compile `decode` and `combine` for one configuration."""
    ways = 8
    shape = cuda_blocks.shape(dim, heads, _vector(dim, bits, scales), windows, capability, wide=wide)
    constants = {
        "D": dim,
        "HEADS": heads,
        "KEY_BITS": bits[0],
        "VALUE_BITS": bits[1],
        "KEY_SCALES": DTYPES[scales[0]],
        "VALUE_SCALES": DTYPES[scales[1]],
        "QUERIES": DTYPES[queries],
        "OUTPUT": DTYPES[queries],
        "KEY_ROUNDS": rounds[0],
        "VALUE_ROUNDS": rounds[1],
        "SOFT_CAP": int(soft_cap),
        "SLIDING": int(sliding),
        "WARPS": shape.warps,
        "BLOCKS": shape.blocks,
        "WAYS": ways,
        "TILE": shape.tile,
        "STAGES": shape.stages,
        "KEY_WINDOW": windows[0],
        "VALUE_WINDOW": windows[1],
        "EVEN": int(even),
        "PAGE": page,
        "WHOLE": int(whole),
        "TOGETHER": int(together),
    }
    numbers = nvrtc.constants(constants)
    named = f"constexpr Book KEY_BOOK = {books[0]}, VALUE_BOOK = {books[1]};"
    parts = "words.cuh", "codes.cuh", numbers, named, "join.cuh", "windows.cuh", "stages.cuh", "decode.cu"
    joining = nvrtc.source(numbers, "join.cuh", "combine.cu")
    threads, shared = 32 * shape.warps, shape.shared
    return (
        nvrtc.Kernel("decode", nvrtc.source(*parts), threads=threads, capability=capability, shared=shared),
        nvrtc.Kernel("combine", joining, threads=32 * ways, capability=capability),
    )
