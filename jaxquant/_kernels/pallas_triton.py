"""The grid for NVIDIA GPUs: the tokens of a row are split over programs, which read the cache through pointers.

Nothing is sliced out of the stacked buffers or copied before the kernel: the layer is one more index. JAX deprecates
this backend, which works from 0.10 to 0.12.
"""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from jaxquant._kernels import pallas_step
from jaxquant._kernels.pallas_step import Block, Carry, Code, Operands, Queries, Setting

BLOCK = 64  # tokens of a step
_PROGRAMS = 1056  # about: eight for each of 132 multiprocessors
_STAGES = 3


def run(setting: Setting, operands: Operands, slots: int) -> tuple[Array, Array, Array]:
    """Give planes of the output [batch, kv_heads, splits, ...], largest scores and sums of weights of every split."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the import
        from jax.experimental.pallas import triton
    warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)  # when lowered

    batch, kv_heads = operands.q.shape[:2]
    splits = min(max(1, slots // (2 * BLOCK)), -(-_PROGRAMS // (batch * kv_heads)))
    warps = 4 if setting.keys.dim <= 128 else 8  # four would spill registers
    lead = batch, kv_heads, splits
    shapes = (setting.values.planes, setting.values.width, setting.rows), (1, setting.rows), (1, setting.rows)
    return pl.pallas_call(
        functools.partial(_kernel, setting, splits),
        grid=lead,
        out_shape=tuple(jax.ShapeDtypeStruct((*lead, *shape), jnp.float32) for shape in shapes),
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=_STAGES),
        interpret=setting.interpret,
        name="jaxquant_decode",
    )(operands)


def _kernel(setting: Setting, splits: int, refs: Operands, out: Any, peak: Any, total: Any) -> None:
    b, h, split = (pl.program_id(axis) for axis in range(3))
    first, stop, exact_from = (refs.bounds[b, i] for i in range(3))
    planes = tuple(refs.q[b, h, p] for p in range(setting.keys.planes))
    queries = Queries(planes, refs.norm[b, h], refs.position[b], exact_from, refs.numbers[1], refs.cap[0])
    keys, values = (
        pallas_step.lookup(setting, code, table, gather=True)
        for code, table in zip((setting.keys, setting.values), refs.levels, strict=True)
    )
    layer = refs.numbers[0]

    def body(i: Array, carry: Carry) -> Carry:
        slot = i * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)
        if setting.page is None:
            lead, at = (layer, b, h), jnp.minimum(slot, refs.codes[0].shape[3] - 1)
        else:
            page = i * BLOCK // setting.page
            lead, at = (refs.table[b, page], h), slot - page * setting.page
        inside = slot < stop
        if refs.visible is not None:
            inside &= refs.visible[b, 0, jnp.minimum(slot, refs.visible.shape[2] - 1)] != 0
        block = Block(
            keys=_tiles(refs.codes[0], setting.keys, lead, at, token_axis=0),
            values=_tiles(refs.codes[1], setting.values, lead, at, token_axis=1),
            key_scale=refs.scales[0][(*lead, at)].astype(jnp.float32)[:, None],
            value_scale=refs.scales[1][(*lead, at)].astype(jnp.float32)[:, None],
            token=(slot + setting.sinks)[:, None],
            inside=inside[:, None],
        )
        return pallas_step.step(setting, (keys, values), queries, block, carry)

    begin = first // BLOCK
    blocks = jnp.maximum((stop + (BLOCK - 1)) // BLOCK - begin, 0)  # of this row; every split takes its share
    own, end = (begin + blocks * (split + i) // splits for i in range(2))
    carry = lax.fori_loop(own, end, body, pallas_step.start(setting))
    for p, part in enumerate(carry.out):
        out[b, h, split, p] = part * carry.largest
    peak[b, h, split], total[b, h, split] = carry.peak, carry.total


def _tiles(ref: Any, code: Code, lead: tuple, at: Array, *, token_axis: int) -> list[Array]:
    shape = (BLOCK, code.width) if token_axis == 0 else (code.width, BLOCK)
    lane = lax.broadcasted_iota(jnp.int32, shape, 1 - token_axis)
    slot = lax.broadcast_in_dim(at, shape, (token_axis,))

    def read(start: int, span: int) -> Array:
        byte = lane if span == code.width else lax.rem(lane, jnp.full(shape, span, jnp.int32))
        return ref[(*lead, slot, byte + np.int32(start))].astype(jnp.int32)

    return pallas_step.tiles(code, 1 - token_axis, read)
