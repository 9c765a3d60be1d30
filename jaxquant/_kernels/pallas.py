"""Decode attention over codes in Pallas: what goes into the kernel and what comes out of it, whichever the grid."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from jaxquant import packing
from jaxquant._kernels import pallas_step, pallas_tpu, pallas_triton, xla
from jaxquant._kernels.pallas_step import Code, Operand, Operands, Setting
from jaxquant._stacks import Index, Stack
from jaxquant.protocols import Quantizer
from jaxquant.quantizers import PerLayer, Quantized, Scalar

Grid = Literal["triton", "tpu"]

MOST_ROWS = 64  # queries of a kv head
_TILE = 16  # least side of a matrix product on a tensor core


def supports(stack: Stack) -> str | None:
    """Say why a stack cannot be read by these kernels; None if it can."""
    for name, store in {"keys": stack.keys, "values": stack.values}.items():
        why = unreadable(store.quantizer, store.codes)
        if why is not None:
            return f"its {name} {why}"
    return None


def unreadable(quantizer: Quantizer | PerLayer, code: Any) -> str | None:
    """Say why codes cannot be read by these kernels; None if they can."""
    if not isinstance(quantizer, Scalar) or not isinstance(code, Quantized):
        return f"are coded by {type(quantizer).__name__}, not Scalar"
    if quantizer.dim % 8:
        return f"have dim {quantizer.dim}, not a multiple of 8"
    if 2**31 < code.codes.size <= 2**32 and jax.default_backend() == "gpu":
        return "take between 2 and 4 GiB, where the offsets of Pallas overflow"
    return None


def coded(
    stack: Stack,
    index: Index,
    q: Float[Array, "batch kv_heads rows dim"],
    position: Int[Array, "batch rows"],
    exact_from: Int[Array, " batch"],
    rule: xla.Rule,
    *,
    grid: Grid | None = None,
    interpret: bool | None = None,
    dtype: Operand | None = None,
) -> xla.Partial:
    """Attend to the coded tokens of layer `index`, as `xla.coded` does, for at most 64 rows a kv head.

    Args:
        stack: the storage.
        index: of the layer.
        q: the queries.
        position: of each of them.
        exact_from: first position that the exact window holds.
        rule: see `xla.Rule`.
        grid: None takes the one of the default backend.
        interpret: None does so on a CPU.
        dtype: of the operands of matrix products; None takes float16 on a GPU and float32 elsewhere.

    Raises:
        ValueError: `supports` gives a reason, or there are more rows.
    """
    why = supports(stack)
    if why is not None:
        raise ValueError(f"Pallas kernels cannot read this cache: {why}")
    return attend(
        (stack.keys.at(index), stack.values.at(index)),
        (stack.keys.codes, stack.values.codes),
        *(q, position, exact_from, rule),
        layer=index,
        sinks=stack.sinks,
        window=stack.window,
        grid=grid,
        interpret=interpret,
        dtype=dtype,
    )


def attend(
    quantizers: tuple[Quantizer, Quantizer],
    codes: tuple[Quantized, Quantized],
    q: Float[Array, "batch kv_heads rows dim"],
    position: Int[Array, "batch rows"],
    exact_from: Int[Array, " batch"],
    rule: xla.Rule,
    *,
    layer: Index = 0,
    sinks: int = 0,
    window: int = 0,
    table: Int[Array, "batch pages"] | None = None,
    grid: Grid | None = None,
    interpret: bool | None = None,
    dtype: Operand | None = None,
) -> xla.Partial:
    """Attend to keys and values in stacked buffers or, given a `table`, in pages [n_pages, kv_heads, page, ...]."""
    keys, values = quantizers
    assert isinstance(keys, Scalar)
    assert isinstance(values, Scalar)
    rows, dim = q.shape[2:]
    if rows > MOST_ROWS:
        raise ValueError(f"q must have at most {MOST_ROWS} rows for each kv head, got {rows}")
    backend = jax.default_backend()
    triton = (grid or ("tpu" if backend == "tpu" else "triton")) == "triton"
    interpret = backend == "cpu" if interpret is None else interpret
    held = codes[0].codes.shape[-2]
    slots = held if table is None else held * table.shape[1]

    def code(bits: int) -> Code:
        span = dim * packing._fields(bits)[0] // 8
        return Code(dim, bits, max(_TILE, pl.next_power_of_2(span)) if triton else span)

    setting = Setting(
        keys=code(keys.bits),
        values=code(values.bits),
        rows=max(8, pl.next_power_of_2(rows)),
        block=pallas_triton.BLOCK if triton else min(pallas_tpu.BLOCK, held),
        page=None if table is None else held,
        sinks=sinks,
        window=window,
        capped=rule.soft_cap is not None,
        sliding=rule.sliding_window is not None,
        dtype=dtype or ("float16" if triton and not interpret else "float32"),
        interpret=interpret,
    )
    planes, norm = _planes(keys.project(q * rule.scale), setting)
    numbers = layer, 0 if rule.sliding_window is None else rule.sliding_window
    operands = Operands(
        bounds=_bounds(position, exact_from, rule, sinks, slots),
        numbers=jnp.stack([jnp.asarray(number, jnp.int32) for number in numbers]),
        table=jnp.zeros((1, 1), jnp.int32) if table is None else table,
        cap=jnp.full((1,), 1.0 if rule.soft_cap is None else rule.soft_cap, jnp.float32),
        levels=(keys.stored_levels, values.stored_levels),
        position=jnp.pad(position, ((0, 0), (0, setting.rows - rows)), constant_values=-1)[:, None],
        q=planes,
        norm=norm,
        codes=(codes[0].codes, codes[1].codes),
        scales=(codes[0].scales, codes[1].scales),
        visible=None if rule.visible is None else rule.visible[:, None, sinks:].astype(jnp.int8),
    )
    out, peak, total = (pallas_triton if triton else pallas_tpu).run(setting, operands, slots)

    top = jnp.max(peak, axis=2, keepdims=True)
    weights = jnp.exp2(peak - jnp.where(top > -jnp.inf, top, 0.0))[:, :, :, 0]
    out = jnp.einsum("bhspwr,bhsr->bhrpw", out, weights, precision="highest")[:, :, :rows, :, : setting.values.span]
    total = jnp.sum(total[:, :, :, 0] * weights, axis=2)[:, :, :rows]
    out = values.restore(out.reshape(*q.shape) * dim**-0.5)
    return xla._normalize(top[:, :, 0, 0, :rows] / pallas_step.LOG2E, total, out)


def _planes(
    q: Float[Array, "batch kv_heads rows dim"], setting: Setting
) -> tuple[Float[Array, "batch kv_heads planes width padded"], Float[Array, "batch kv_heads 1 padded"]]:
    """Scale queries to 1 and cut them into the planes of the codes of keys."""
    batch, kv_heads, rows, dim = q.shape
    code = setting.keys
    norm = jnp.max(jnp.abs(q), axis=-1)
    q = q / jnp.where(norm > 0, norm, 1.0)[..., None]
    q = jnp.moveaxis(q.reshape(batch, kv_heads, rows, code.planes, code.span), 2, -1)
    more = setting.rows - rows
    q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, code.width - code.span), (0, more))).astype(setting.dtype)
    norm = norm * (dim**-0.5 * (1.0 if setting.capped else pallas_step.LOG2E))
    return q, jnp.pad(norm, ((0, 0), (0, 0), (0, more)))[:, :, None]


def _bounds(
    position: Int[Array, "batch rows"], exact_from: Int[Array, " batch"], rule: xla.Rule, sinks: int, slots: int
) -> Int[Array, "batch 3"]:
    stop = jnp.clip(jnp.max(position, axis=1) + 1 - sinks, 0, slots)
    first = jnp.zeros_like(stop)
    if rule.sliding_window is not None:
        oldest = jnp.min(jnp.where(position < 0, jnp.iinfo(jnp.int32).max, position), axis=1)
        first = jnp.clip(oldest - rule.sliding_window + 1 - sinks, 0, slots)
    return jnp.stack([first, stop, exact_from], axis=1)
