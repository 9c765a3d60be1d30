"""Fused coding for NVIDIA GPUs: rotate, normalize, assign, scale, pack and write into the cache, in one pass.

The kernel writes into the buffers it is given: where XLA may give them up, as in a step that donates the cache, nothing
is copied.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxquant._kernels import cuda_blocks, cuda_formats, cuda_trellis, nvrtc
from jaxquant._stacks import Index, Store
from jaxquant.quantizers import Quantized
from jaxquant.trellis import Trellis

_WARPS = 4


def unsupported(store: Store) -> str | None:
    """Say why the kernel cannot code for a store, or return None where it can."""
    quantizer = store.quantizer
    if isinstance(quantizer, Trellis):
        obstacle = cuda_trellis.uncodable(quantizer)
        return f"vectors {obstacle}" if obstacle else None
    obstacle = cuda_formats.unreadable(quantizer)
    if obstacle is not None:
        return f"vectors {obstacle}"
    if quantizer.dim not in (64, 128, 256):
        return f"dim is {quantizer.dim}, not 64, 128 or 256"
    return None


def encode(
    store: Store, index: Index, x: Float[Array, "batch new kv_heads dim"], slot: Int[Array, "batch new"]
) -> Quantized:
    """Code vectors into slots of a layer.

    Args:
        store: `unsupported` returned None for it.
        index: of the layer; beyond the last one, nothing is stored.
        x: the vectors, in any of the float dtypes.
        slot: of each token; outside of the store, the token is dropped.

    Returns:
        The codes of the whole store.

    Raises:
        ValueError: there are 2**31 vectors or more.
    """
    quantizer: Any = store.quantizer
    held = store.codes
    rounds = cuda_formats.rounds(quantizer)
    if rounds is None:
        x = quantizer.rotation.rotate(jnp.nan_to_num(x.astype(jnp.float32)))
    constants = {
        "dim": quantizer.dim,
        "scales": quantizer.scale_dtype,
        "given": x.dtype.name,
        "rounds": rounds or 0,
        "rule": quantizer.scale,
    }
    layers, batch, kv_heads, slots = held.codes.shape[:4]
    vectors = batch * x.shape[1] * kv_heads
    if vectors >= 2**31:
        raise ValueError(f"at most 2**31 - 1 vectors can be appended at a time, got {vectors}")
    if isinstance(quantizer, Trellis):
        code = quantizer.code
        made = cuda_trellis.kernel(bits=code.widths[0], states=code.states, **constants)
        each = cuda_trellis.shape(code.dim, code.widths[0], code.states)
        work, blocks = -(-vectors // (each.vectors * cuda_trellis.WARPS)), each.blocks
    else:
        made = kernel(bits=quantizer.bits, book=cuda_formats.book(quantizer), **constants)
        tiles = -(-batch * x.shape[1] // 16) * kv_heads
        work, blocks = -(-tiles // _WARPS), _blocks(quantizer.dim)
    codes, scales = made(
        [
            x,
            jnp.asarray(index, jnp.int32),
            slot,
            cuda_formats.levels(quantizer),
            cuda_formats.signs(quantizer),
            held.codes,
            held.scales,
        ],
        [layers, batch, x.shape[1], kv_heads, slots],
        [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in (held.codes, held.scales)],
        grid=(max(1, min(work, blocks * cuda_blocks.cores())), 1),
        aliases={5: 0, 6: 1},
    )
    return Quantized(codes=codes, scales=scales)


def _blocks(dim: int) -> int:
    """Give the blocks of a multiprocessor: vectors of 256 numbers need all registers that two can have."""
    return 2 if dim == 256 else 3


@functools.cache
def kernel(
    *,
    dim: int,
    bits: int,
    book: str,
    scales: str,
    given: str,
    rounds: int,
    rule: str,
    capability: tuple[int, int] | None = None,
) -> nvrtc.Kernel:
    """Compile the kernel for one configuration."""
    constants = {
        "D": dim,
        "BITS": bits,
        "SCALES": cuda_formats.DTYPES[scales],
        "INPUT": cuda_formats.DTYPES[given],
        "ROUNDS": rounds,
        "BLOCKS": _blocks(dim),
        "RULE": cuda_formats.RULES[rule],
    }
    named = f"constexpr Book BOOK = {book};"
    text = nvrtc.source(
        "words.cuh", "codes.cuh", nvrtc.constants(constants), named, "lengths.cuh", "assign.cuh", "encode.cu"
    )
    return nvrtc.Kernel("encode", text, threads=32 * _WARPS, capability=capability or nvrtc.capability() or (9, 0))
