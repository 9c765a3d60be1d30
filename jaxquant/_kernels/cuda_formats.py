"""What the CUDA kernels can read and write, and how they name it: codebooks, scales, rotations, trellis codes."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jaxquant._kernels import nvrtc
from jaxquant.protocols import Quantizer
from jaxquant.quantizers import PerLayer, Scalar
from jaxquant.rotations import Hadamard, Identity
from jaxquant.trellis import Trellis

RULES = {"norm": 0, "preserve": 1, "unbiased": 2, "least_squares": 3}
DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
_DIMS = (64, 80, 96, 128, 256)
_WINDOW = 10  # bits that decide two coordinates of a trellis code, at most: a table has 128 bytes for each window
ROOMY = ((9, 0), (10, 0), (10, 3), (11, 0))  # compute capabilities whose blocks can have 227 KB of shared memory


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
    if lowest is not None and lowest not in ROOMY:
        return f"have trellis codes, for which compute capability {lowest[0]}.{lowest[1]} has too little shared memory"
    if code.kind != "table":
        return f"have trellis codes of kind {code.kind}, not table"
    tables = sum(map(len, code.tables))
    if tables > 1:
        return f"have trellis codes with {tables} tables, more than one"
    if code.widths[0] > 2:
        return f"have trellis codes of {code.widths[0]} bits, more than 2"
    if code.dim not in (64, 128, 256)[code.widths[0] == 1 :]:
        return f"have trellis codes of dim {code.dim}, not a power of two from {128 // code.widths[0]} to 256"
    if pair_window(quantizer) > _WINDOW:
        return f"have a trellis of {code.states} states, more than {1 << _WINDOW - 2 * code.widths[0]}"
    return None


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
        case 4, "signed":
            return "SIGNED"
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


def levels(quantizer: Scalar | Trellis) -> Array:
    """Give the levels of a codebook or of a trellis."""
    return quantizer.code.tables[0][0] if isinstance(quantizer, Trellis) else quantizer.codebook.centroids
