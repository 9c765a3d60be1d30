"""Fused decode attention for NVIDIA GPUs, from compute capability 8.0 on.

The kernels are CUDA C++ in `sources/`, compiled for the shapes at hand when they are first traced. `decode` reads the
stacked buffers in place: the layer, the lengths and the settings are operands in device memory, so that nothing is
sliced, copied or synchronized. Few parts of a row are joined by the blocks that made them, many by `combine`.
`docs/kernels.md` has the design and what it reaches.
"""

import functools
import importlib.resources
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxquant._kernels import nvrtc
from jaxquant._kernels.xla import Partial, Rule
from jaxquant._spread import Spread
from jaxquant._stacks import Index, Stack
from jaxquant.protocols import Quantizer
from jaxquant.quantizers import PerLayer, Quantized, Scalar
from jaxquant.rotations import Hadamard, Identity
from jaxquant.trellis import Trellis

_TILE = 32
RULES = {"norm": 0, "preserve": 1, "unbiased": 2, "least_squares": 3}
DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
_DIMS = (64, 80, 96, 128, 256)
_MOST_STAGES = 3
_SHARED = 218 * 1024  # bytes of a multiprocessor's shared memory that its blocks share
_WINDOW = 10  # bits that decide two coordinates of a trellis code, at most: a table has 128 bytes for each window
_ROOMY = ((9, 0), (10, 0), (10, 3), (11, 0))  # compute capabilities whose blocks can have 227 KB of shared memory


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
    if stack.slots < _TILE:
        return f"there is room for {stack.slots} coded tokens, fewer than {_TILE}"
    if rule.visible is not None:
        return "`visible` is given"
    return None


def unreadable(quantizer: Quantizer | PerLayer) -> str | None:
    """Say why codes of a quantizer cannot be read by these kernels, or return None where they can."""
    if isinstance(quantizer, Trellis):
        return _unreadable_trellis(quantizer)
    if not isinstance(quantizer, Scalar):
        return f"are held by {type(quantizer).__name__}, not by quantizers.Scalar"
    if book(quantizer) is None:
        return f"have {quantizer.bits} bits and a codebook of grid {quantizer.codebook.grid!r}"
    if quantizer.codebook.centroids.shape[-1] != 2**quantizer.bits:
        return f"have {quantizer.codebook.centroids.shape[-1]} levels, not {2**quantizer.bits}"
    if quantizer.dim not in _DIMS:
        return f"have dim {quantizer.dim}, not one of {', '.join(map(str, _DIMS))}"
    return None


def _unreadable_trellis(quantizer: Trellis) -> str | None:
    code, lowest = quantizer.code, nvrtc.capability()
    if lowest is not None and lowest not in _ROOMY:
        return f"have trellis codes, for which compute capability {lowest[0]}.{lowest[1]} has too little shared memory"
    if code.kind != "table":
        return f"have trellis codes of kind {code.kind}, not table"
    if len(code.tables) > 1 or len(code.tables[0]) > 1:
        return f"have trellis codes with {sum(map(len, code.tables))} tables, more than one"
    if code.widths[0] > 2:
        return f"have trellis codes of {code.widths[0]} bits, more than 2"
    if code.dim not in (64, 128, 256)[code.widths[0] == 1 :]:
        return f"have trellis codes of dim {code.dim}, not a power of two from {128 // code.widths[0]} to 256"
    if pair_window(quantizer) > _WINDOW:
        return f"have a trellis of {code.states} states, more than {1 << _WINDOW - 2 * code.widths[0]}"
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
) -> Partial:
    """Attend to keys and values in stacked buffers or, given a `table`, in pages [pages, kv_heads, page, ...]."""
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
    windows = pair_window(keys), pair_window(values)
    shape = _shape(dim, heads, trellis=any(windows))
    passes = -(-heads // shape.columns)
    parts = _parts(batch * kv_heads * passes, slots, shape, most_together())
    together = parts <= most_together()
    decode, combine = kernels(
        dim=dim,
        heads=heads,
        bits=(width(keys), width(values)),
        books=(str(book(keys)), str(book(values))),
        scales=(keys.scale_dtype, values.scale_dtype),
        queries=dtype,
        rounds=(key_rounds or 0, value_rounds or 0),
        soft_cap=rule.soft_cap is not None,
        sliding=rule.sliding_window is not None,
        even=slots % 8 == 0,
        page=page,
        cluster=parts if together else 0,
        windows=windows,
    )
    nothing = jnp.zeros((), jnp.float32)
    results = [
        jax.ShapeDtypeStruct((batch, kv_heads, heads, dim), dtype),
        jax.ShapeDtypeStruct((batch, kv_heads, heads), jnp.float32),
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
            *(results if together else [jax.ShapeDtypeStruct((1,), jnp.float32)] * 2),
        ],
        grid=(batch * kv_heads * passes, parts),
    )
    if not together:
        out, lse = combine([partial, sums, signs(values)], [parts], results, grid=(batch * kv_heads * heads, 1))
    if value_rounds is None:
        out = values.restore(out)
    return Partial(out.astype(asked), lse)


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
    page: int = 0,
    cluster: int = 0,
    windows: tuple[int, int] = (0, 0),
    capability: tuple[int, int] | None = None,
) -> tuple[nvrtc.Kernel, nvrtc.Kernel]:
    """Compile `decode` and `combine` for one configuration; with a `cluster`, `decode` joins its parts itself."""
    capability = capability or nvrtc.capability() or (9, 0)
    ways = 8
    shape = _shape(dim, heads, trellis=any(windows))
    table = 128 << max(windows) if any(windows) else 0
    stage = _TILE * (dim * sum(bits) // 8 + sum(4 if scale == "float32" else 2 for scale in scales))
    room = _SHARED // shape.blocks - table - (4 if windows[0] else 2) * shape.columns * (dim + 8) - 2048
    stages = max(2, min(_MOST_STAGES, room // (shape.warps * stage)))
    shared = max(table + shape.warps * stages * stage, 4 * shape.warps * shape.columns * (dim + 1))
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
        "STAGES": stages,
        "KEY_WINDOW": windows[0],
        "VALUE_WINDOW": windows[1],
        "EVEN": int(even),
        "PAGE": page,
        "CLUSTER": cluster,
    }
    together = f"#define TOGETHER {f'__cluster_dims__(1, {cluster}, 1)' if cluster > 1 else ''}"
    numbers = "\n".join(f"constexpr int {name} = {value};" for name, value in constants.items())
    grids = f"constexpr Book KEY_BOOK = {books[0]}, VALUE_BOOK = {books[1]};"
    parts = "words.cuh", "codes.cuh", numbers, grids, together, "join.cuh", "windows.cuh", "stages.cuh", "decode.cu"
    text = source(*parts)
    return (
        nvrtc.Kernel("decode", text, threads=32 * shape.warps, capability=capability, shared=shared),
        nvrtc.Kernel("combine", source(numbers, "join.cuh", "combine.cu"), threads=32 * ways, capability=capability),
    )


def source(*parts: str) -> str:
    """Put a source together: files of `sources/` after the ones all need, and text that is no file's name."""
    folder = importlib.resources.files("jaxquant._kernels") / "sources"
    files = ("intrinsics.cuh", "rotate.cuh", *parts)
    return "\n".join((folder / part).read_text() if part.endswith((".cu", ".cuh")) else part for part in files)


def _operands(code: Quantized, quantizer: Scalar | Trellis) -> list[Array]:
    assert code.scales is not None
    levels = quantizer.code.tables[0][0] if isinstance(quantizer, Trellis) else quantizer.codebook.centroids
    return [code.codes, code.scales, levels]


def width(quantizer: Scalar | Trellis) -> int:
    """Give the bits of a coordinate."""
    return quantizer.code.widths[0] if isinstance(quantizer, Trellis) else quantizer.bits


def pair_window(quantizer: Scalar | Trellis) -> int:
    """Give the bits that decide two neighbouring coordinates of a trellis code, and 0 for scalar codes."""
    return quantizer.code.memory + 2 * width(quantizer) if isinstance(quantizer, Trellis) else 0


def book(quantizer: Scalar | Trellis) -> str | None:
    """Give the kernels' name of a codebook (`sources/codes.cuh`), or None where they have none."""
    if isinstance(quantizer, Trellis):
        return "TRELLIS"
    match quantizer.bits, quantizer.codebook.grid:
        case 2, "uniform":
            return "UNIFORM"
        case 4, "symmetric":
            return "SYMMETRIC"
        case 2 | 3 | 4, "bytes":
            return "ANY"
        case 8, _:
            return "TABLE"
    return None


def rounds(quantizer: Scalar | Trellis) -> int | None:
    """Give the rounds of a rotation the kernels can do themselves, or None."""
    rotation: Any = quantizer.rotation
    if isinstance(rotation, Identity):
        return 0
    if isinstance(rotation, Hadamard) and quantizer.dim & (quantizer.dim - 1) == 0:
        return rotation.signs.shape[0]
    return None


def signs(quantizer: Scalar | Trellis) -> Array:
    """Give the signs of a rotation of which `rounds` is not 0."""
    rotation: Any = quantizer.rotation
    return rotation.signs if rounds(quantizer) else jnp.zeros((1, 1), jnp.int8)


class _Shape(NamedTuple):
    """Query heads and warps of a block, and blocks that a multiprocessor is to hold, which bounds their registers."""

    columns: int
    warps: int
    blocks: int


def _shape(dim: int, heads: int, *, trellis: bool = False) -> _Shape:
    if trellis:  # a multiprocessor has room for one table
        return _Shape(
            16 if heads > 8 and dim < 256 else 8, 8 if heads > 8 or dim == 256 else 16 if heads <= 4 else 12, 1
        )
    if dim == 256:
        return _Shape(columns=8, warps=4, blocks=2)
    return _Shape(columns=16, warps=6, blocks=2) if heads > 8 else _Shape(columns=8, warps=8, blocks=2)


def _parts(rows: int, slots: int, shape: _Shape, together: int) -> int:
    """Choose into how many parts a row's tokens are split, by what the slowest multiprocessor has to do.

    The unit is the time of a tile. A block starts and ends in about two of them, and so does `combine`, which parts
    that cannot be joined `together` need.
    """
    places = shape.blocks * cores()
    most = max(1, min(256, slots // (_TILE * shape.warps)))

    def cost(parts: int) -> float:
        tiles = math.ceil(slots / (_TILE * shape.warps * parts))
        return math.ceil(rows * parts / places) * (tiles + 2) + (2 + 0.02 * parts) * (parts > together)

    return min(range(1, most + 1), key=cost)


def most_together() -> int:
    """Give how many parts of a row one launch can join: blocks wait for each other from compute capability 9.0 on."""
    return 8 if (nvrtc.capability() or (9, 0)) >= (9, 0) else 1


def cores() -> int:
    """Count the multiprocessors of the first GPU."""
    try:
        return jax.devices("cuda")[0].core_count  # pyright: ignore[reportAttributeAccessIssue]
    except (RuntimeError, AttributeError):
        return 132
