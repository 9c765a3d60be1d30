"""How decode attention is dealt out to the warps, blocks and multiprocessors of a GPU."""

import math
from typing import NamedTuple

import jax

from jaxquant._kernels import nvrtc

TILE = 32  # tokens
_MOST_STAGES = 3
_SHARED = 218 * 1024  # bytes of a multiprocessor's shared memory that its blocks share


class Shape(NamedTuple):
    """Query heads and warps of a block, and blocks that a multiprocessor is to hold, which bounds their registers."""

    columns: int
    warps: int
    blocks: int


def shape(dim: int, heads: int, *, trellis: bool = False) -> Shape:
    """Choose a block for vectors of `dim`, `heads` query heads a kv head, and scalar or `trellis` codes."""
    if trellis:  # a multiprocessor has room for one table
        return Shape(
            16 if heads > 8 and dim < 256 else 8, 8 if heads > 8 or dim == 256 else 16 if heads <= 4 else 12, 1
        )
    if dim == 256:
        return Shape(columns=8, warps=4, blocks=2)
    return Shape(columns=16, warps=6, blocks=2) if heads > 8 else Shape(columns=8, warps=8, blocks=2)


def stages(shape: Shape, dim: int, vector: int, windows: tuple[int, int]) -> tuple[int, int]:
    """Give the tiles of a warp that are under way, and the bytes of shared memory of a block.

    Args:
        shape: of the block.
        dim: of a vector.
        vector: bytes of a key, a value and their scales.
        windows: bits of the windows of trellis codes, of keys and of values.
    """
    table = 128 << max(windows) if any(windows) else 0
    room = _SHARED // shape.blocks - table - (4 if windows[0] else 2) * shape.columns * (dim + 8) - 2048
    tile = shape.warps * TILE * vector
    count = max(2, min(_MOST_STAGES, room // tile))
    return count, max(table + count * tile, 4 * shape.warps * shape.columns * (dim + 1))


def parts(rows: int, slots: int, shape: Shape, together: int) -> int:
    """Choose into how many parts a row's tokens are split, by what the slowest multiprocessor has to do.

    The unit is the time of a tile. A block starts and ends in about two of them, and so does `combine`, which parts
    that cannot be joined `together` need.
    """
    places = shape.blocks * cores()
    most = max(1, min(256, slots // (TILE * shape.warps)))

    def cost(count: int) -> float:
        tiles = math.ceil(slots / (TILE * shape.warps * count))
        return math.ceil(rows * count / places) * (tiles + 2) + (2 + 0.02 * count) * (count > together)

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
