"""The grid for TPUs: the blocks of a row one after the other, fetched by the pipeline.

Run in interpret mode only, never on hardware.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from jaxquant._kernels import pallas_step
from jaxquant._kernels.pallas_step import Block, Carry, Code, Operands, Queries, Setting

BLOCK = 512  # tokens of a step, at most


def run(setting: Setting, operands: Operands, slots: int) -> tuple[Array, Array, Array]:
    """Give planes of the output [batch, kv_heads, 1, ...], the largest scores and the sums of weights."""
    batch, kv_heads = operands.q.shape[:2]
    shapes = (setting.values.planes, setting.values.width, setting.rows), (1, setting.rows), (1, setting.rows)
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(batch, kv_heads, -(-slots // setting.block)),
        in_specs=_specs(setting, operands),
        out_specs=tuple(_blocked(1, 1, 1, *shape) for shape in shapes),
        scratch_shapes=[
            *[pltpu.VMEM((1, setting.rows), jnp.float32)] * 3,
            pltpu.VMEM(shapes[0], jnp.float32),
        ],
    )
    return pl.pallas_call(
        functools.partial(_kernel, setting),
        grid_spec=grid_spec,
        out_shape=tuple(jax.ShapeDtypeStruct((batch, kv_heads, 1, *shape), jnp.float32) for shape in shapes),
        interpret=setting.interpret,
        name="jaxquant_decode",
    )(operands.bounds, operands.numbers, operands.table, operands[3:])


def _kernel(
    setting: Setting, bounds: Any, numbers: Any, table: Any, rest: Any, out: Any, peak: Any, total: Any, *scratch: Any
) -> None:
    refs = Operands(bounds, numbers, table, *rest)
    b, h, i = (pl.program_id(axis) for axis in range(3))
    first, stop, exact_from = (bounds[b, n] for n in range(3))
    block = first // setting.block + i

    def load() -> Carry:
        peak, total, largest, planes = scratch
        return Carry(peak[...], total[...], largest[...], tuple(planes[p] for p in range(setting.values.planes)))

    def store(carry: Carry) -> None:
        for ref, value in zip(scratch[:3], carry[:3], strict=True):
            ref[...] = value
        for p, part in enumerate(carry.out):
            scratch[3][p] = part

    @pl.when(i == 0)
    def _() -> None:
        store(pallas_step.start(setting))

    @pl.when(block * setting.block < stop)
    def _() -> None:
        planes = tuple(refs.q[0, 0, p] for p in range(setting.keys.planes))
        queries = Queries(planes, refs.norm[0, 0], refs.position[0], exact_from, numbers[1], refs.cap[0])
        keys, values = (
            pallas_step.lookup(setting, code, levels, gather=False)
            for code, levels in zip((setting.keys, setting.values), refs.levels, strict=True)
        )
        slot = block * setting.block + lax.broadcasted_iota(jnp.int32, (setting.block, 1), 0)
        inside = slot < stop
        if refs.visible is not None:
            inside &= refs.visible[0, 0][:, None] != 0
        tokens = Block(
            keys=_tiles(refs.codes[0], setting.keys, transposed=False),
            values=_tiles(refs.codes[1], setting.values, transposed=True),
            key_scale=_scales(refs.scales[0], h),
            value_scale=_scales(refs.scales[1], h),
            token=slot + setting.sinks,
            inside=inside,
        )
        store(pallas_step.step(setting, (keys, values), queries, tokens, load()))

    @pl.when(i == pl.num_programs(2) - 1)
    def _() -> None:
        carry = load()
        for p, part in enumerate(carry.out):
            out[0, 0, 0, p] = part * carry.largest
        peak[0, 0, 0], total[0, 0, 0] = carry.peak, carry.total


def _specs(setting: Setting, operands: Operands) -> list[Any]:
    smem = pl.BlockSpec(memory_space=pltpu.SMEM)
    paged = setting.page is not None
    kv_heads = operands.q.shape[1]

    def block(b: Any, i: Any, bounds: Any) -> Any:
        """Stay on the last block that is needed, so that no other is fetched."""
        last = jnp.maximum(bounds[b, 1] - 1, 0) // setting.block
        return jnp.minimum(bounds[b, 0] // setting.block + i, last)

    def fetched(leaf: Array, *, heads: int) -> pl.BlockSpec:
        tail = leaf.shape[3 if paged else 4 :]

        def at(b: Any, h: Any, i: Any, bounds: Any, numbers: Any, table: Any) -> tuple:
            head, which = (h if heads == 1 else 0), block(b, i, bounds)
            place = (table[b, which], head, 0) if paged else (numbers[0], b, head, which)
            return *place, *(0,) * len(tail)

        return pl.BlockSpec((*(1,) * (1 if paged else 2), heads, setting.block, *tail), at)

    visible = pl.BlockSpec((1, 1, setting.block), lambda b, h, i, bounds, *_: (b, 0, block(b, i, bounds)))
    specs = Operands(
        *(None, None, None),
        cap=smem,
        levels=(smem, smem),
        position=pl.BlockSpec((1, 1, setting.rows), lambda b, h, i, *_: (b, 0, 0)),
        q=_blocked(1, 1, *operands.q.shape[2:]),
        norm=_blocked(1, 1, *operands.norm.shape[2:]),
        codes=(fetched(operands.codes[0], heads=1), fetched(operands.codes[1], heads=1)),
        scales=(fetched(operands.scales[0], heads=kv_heads), fetched(operands.scales[1], heads=kv_heads)),
        visible=None if operands.visible is None else visible,
    )
    return [specs[3:]]


def _blocked(*shape: int) -> pl.BlockSpec:
    return pl.BlockSpec(shape, lambda b, h, i, *_: (b, h, *(0,) * (len(shape) - 2)))


def _tiles(ref: Any, code: Code, *, transposed: bool) -> list[Array]:
    held = ref[(0,) * (len(ref.shape) - 2)].astype(jnp.int32)

    def read(start: int, span: int) -> Array:
        part = held[:, start : start + span]
        part = jnp.concatenate([part] * (code.span // span), axis=1)
        return part.T if transposed else part

    return pallas_step.tiles(code, 0 if transposed else 1, read)


def _scales(ref: Any, head: Array) -> Array:
    return ref[(*(0,) * (len(ref.shape) - 2), head)].astype(jnp.float32)[:, None]
