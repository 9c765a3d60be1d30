"""The kernel of `cuda_encode` for trellis codes: rotate, normalize, search, scale, pack and write into the cache.

The search is that of `jaxquant.viterbi`, with the states of a vector spread over the lanes of a warp; `docs/kernels.md`
has the design.
"""

import functools
from typing import NamedTuple

from jaxquant import viterbi
from jaxquant._kernels import cuda_formats, nvrtc
from jaxquant.trellis import Trellis

BITS = (1, 2, 3)
STATES = (16, 32, 64, 128, 256)
DIMS = (64, 128, 256)
WARPS = 4
_SHARED = 227 * 1024  # bytes of a multiprocessor's shared memory


def uncodable(quantizer: Trellis) -> str | None:
    """Say why the kernel cannot search for codes, or return None where it can."""
    code = quantizer.code
    tables = sum(map(len, code.tables))
    if tables > 1:
        return f"have trellis codes with {tables} tables, more than one"
    for name, value, possible in (
        ("a trellis of kind", code.kind, ("table",)),
        ("bits", code.widths[0], BITS),
        ("states", code.states, STATES),
        ("dim", code.dim, DIMS),
    ):
        if value not in possible:
            return f"have {name} {value}, not one of {', '.join(map(str, possible))}"
    return None


@functools.cache
def kernel(
    *,
    dim: int,
    bits: int,
    states: int,
    scales: str,
    given: str,
    rounds: int,
    rule: str,
    capability: tuple[int, int] | None = None,
) -> nvrtc.Kernel:
    """Compile the kernel for one configuration."""
    each = shape(dim, bits, states)
    constants = {
        "D": dim,
        "BITS": bits,
        "STATES": states,
        "DEPTH": viterbi.depth(dim, dim * bits, states),
        "SCALES": cuda_formats.DTYPES[scales],
        "INPUT": cuda_formats.DTYPES[given],
        "ROUNDS": rounds,
        "RULE": cuda_formats.RULES[rule],
        "WARPS": WARPS,
        "BLOCKS": each.blocks,
        "SPACE": each.space,
    }
    numbers = "\n".join(f"constexpr int {name} = {value};" for name, value in constants.items())
    return nvrtc.Kernel(
        "encode_trellis",
        nvrtc.source("words.cuh", numbers, "lengths.cuh", "encode_trellis.cu"),
        threads=32 * WARPS,
        shared=WARPS * each.space,
        capability=capability or nvrtc.capability() or (9, 0),
    )


class Shape(NamedTuple):
    """Vectors of a warp, bytes of shared memory that it needs, and blocks that a multiprocessor is to hold."""

    vectors: int
    space: int
    blocks: int


def shape(dim: int, bits: int, states: int) -> Shape:
    """Give the shape of the kernel for one configuration."""
    butterflies = states >> bits
    vectors = max(1, 32 // butterflies)
    survivors = 4 * vectors * states * -(-dim // (32 // bits))
    metrics = 8 * vectors * (states + (max(4, butterflies) if butterflies < 32 else 0))
    space = survivors + metrics + vectors * (2 * dim + 4 * (dim + 1))
    space = -(-space // 16) * 16
    levels = max(1, butterflies // 32) << 2 * bits  # in registers
    fit = 6 if levels <= 16 else 5 if levels <= 32 else 4
    return Shape(vectors, space, max(1, min(fit, _SHARED // (WARPS * space + 1024))))
