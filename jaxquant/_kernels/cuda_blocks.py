"""How decode attention is dealt out to the warps, blocks and multiprocessors of a GPU."""

import math
from typing import NamedTuple

import jax

from jaxquant._kernels import cuda_formats

TILE, _WIDE = 32, 64  # tokens that a warp reads at a time
_WIDE_WARPS = 12
_MOST_STAGES = 3  # of narrow tiles, and 2 of wide ones
# KB of a multiprocessor that queries, tables and stages of its blocks share: ten less than it has, for what the system
# takes of each block and for the bytes of queries in the order of products
_SHARED = {(8, 0): 154, (8, 7): 154} | dict.fromkeys(cuda_formats.ROOMY, 218)
_LEAST_SHARED = 90  # on all others


class Shape(NamedTuple):
    """A block, and how many of them a multiprocessor is to hold, which bounds their registers.

    Attributes:
        columns: query heads.
        warps: of 32 lanes.
        blocks: of a multiprocessor.
        tile: tokens that a warp reads at a time.
        stages: tiles of a warp that are under way.
        shared: bytes of dynamic shared memory.
    """

    columns: int
    warps: int
    blocks: int
    tile: int
    stages: int
    shared: int


def shape(
    dim: int, heads: int, vector: int, windows: tuple[int, int], capability: tuple[int, int], *, wide: bool
) -> Shape:
    """Choose a block.

    One block of twelve warps with wide tiles has more instructions between two waits, and more registers, than two of
    eight with narrow ones, and is faster where there is room for it.

    Args:
        dim: of a vector.
        heads: query heads that share a kv head.
        vector: bytes of a key, a value and their scales.
        windows: bits of the windows of trellis codes, of keys and of values; 0 for scalar codes.
        capability: of the GPU.
        wide: whether tiles may have 64 tokens, see `wide`.
    """
    columns = 16 if heads > 8 and dim < 256 else 8
    kept = (4 if windows[0] else 2) * columns * (dim + 8) + 2048  # queries, and what is small
    whole = 1024 * _SHARED.get(capability, _LEAST_SHARED) - _table(windows)
    room = whole - kept

    def made(warps: int, blocks: int, tile: int) -> Shape:
        each = warps * tile * vector
        stages = 2 if tile == _WIDE else max(2, min(_MOST_STAGES, (whole // blocks - kept) // each))
        shared = max(stages * each, 4 * warps * columns * (dim + 1))
        return Shape(columns, warps, blocks, tile, stages, _table(windows) + shared)

    if any(windows):  # a multiprocessor has room for one table
        wanted = 8 if heads > 8 or dim == 256 else 16 if heads <= 4 else 12
        return made(min(wanted, room // (2 * TILE * vector) // 2 * 2), 1, TILE)
    if wide and heads <= 8 and dim < 256 and 2 * _WIDE_WARPS * _WIDE * vector <= room:
        return made(_WIDE_WARPS, 1, _WIDE)
    warps = 4 if dim == 256 else 6 if heads > 8 else 8
    while warps > 1 and 2 * warps * TILE * vector > room:
        warps //= 2
    two = made(warps, 2, TILE)
    return two if 2 * (two.shared + kept) <= whole else made(warps, 1, TILE)


def wide(rows: int, slots: int, page: int) -> bool:
    """Say whether tiles may have 64 tokens: buffers and pages allow it, and there is enough to read for all blocks.

    Args:
        rows: kv heads of all rows of the batch.
        slots: tokens that a row has room for.
        page: tokens of a page, or 0.
    """
    fits = slots >= _WIDE and slots % 8 == 0 and page % _WIDE == 0
    return fits and rows * slots >= 2 * cores() * _WIDE_WARPS * _WIDE


def _table(windows: tuple[int, int]) -> int:
    return 128 << max(windows) if any(windows) else 0


def parts(rows: int, slots: int, shape: Shape) -> int:
    """Choose into how many parts a row's tokens are split, by what the slowest multiprocessor has to do.

    The unit is the time of a tile. A block starts and ends in about two of them, and so does what joins parts.
    """
    places = shape.blocks * cores()
    most = max(1, min(256, slots // (shape.tile * shape.warps)))

    def cost(count: int) -> float:
        tiles = math.ceil(slots / (shape.tile * shape.warps * count))
        return math.ceil(rows * count / places) * (tiles + 2) + (2 + 0.02 * count) * (count > 1)

    return min(range(1, most + 1), key=cost)


def cores() -> int:
    """Count the multiprocessors of the first GPU."""
    try:
        return jax.devices("cuda")[0].core_count  # pyright: ignore[reportAttributeAccessIssue]
    except (RuntimeError, AttributeError):
        return 132
