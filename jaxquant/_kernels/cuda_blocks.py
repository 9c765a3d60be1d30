"""How decode attention is dealt out to the warps, blocks and multiprocessors of a GPU."""

from typing import NamedTuple

import jax

TILE = 32  # tokens
_MOST_STAGES = 3
_SHARED = 218 * 1024  # bytes of a multiprocessor's shared memory that its blocks share


class Shape(NamedTuple):
    """Query heads and warps of a block, and blocks that a multiprocessor is to hold, which bounds their registers."""

    columns: int
    warps: int
    blocks: int


def shape(dim: int, heads: int, vector: int, windows: tuple[int, int]) -> Shape:
    """Choose a block.

    Args:
        dim: of a vector.
        heads: query heads that share a kv head.
        vector: bytes of a key, a value and their scales.
        windows: bits of the windows of trellis codes, of keys and of values; 0 for scalar codes.
    """
    if any(windows):  # a multiprocessor has room for one table
        wanted = 8 if heads > 8 or dim == 256 else 16 if heads <= 4 else 12
        fitting = (_SHARED - 6 * 1024 - _table(windows)) // (2 * TILE * vector)
        return Shape(columns=16 if heads > 8 and dim < 256 else 8, warps=min(wanted, fitting // 2 * 2), blocks=1)
    if dim == 256:
        return Shape(columns=8, warps=4, blocks=2)
    return Shape(columns=16, warps=6, blocks=2) if heads > 8 else Shape(columns=8, warps=8, blocks=2)


def stages(shape: Shape, dim: int, vector: int, windows: tuple[int, int]) -> tuple[int, int]:
    """Give the tiles of a warp that are under way, and the bytes of shared memory of a block: see `shape`."""
    table = _table(windows)
    room = _SHARED // shape.blocks - table - (4 if windows[0] else 2) * shape.columns * (dim + 8) - 2048
    tile = shape.warps * TILE * vector
    under_way = max(2, min(_MOST_STAGES, room // tile))
    return under_way, table + max(under_way * tile, 4 * shape.warps * shape.columns * (dim + 1))


def _table(windows: tuple[int, int]) -> int:
    return 128 << max(windows) if any(windows) else 0


def count(lines: int, slots: int, shape: Shape) -> int:
    """Give the blocks of a launch: as many as run at once, if rows were full and each had at least a step to do."""
    return min(shape.blocks * cores(), lines * -(-slots // (TILE * shape.warps)))


def cores() -> int:
    """Count the multiprocessors of the first GPU."""
    try:
        return jax.devices("cuda")[0].core_count  # pyright: ignore[reportAttributeAccessIssue]
    except (RuntimeError, AttributeError):
        return 132
