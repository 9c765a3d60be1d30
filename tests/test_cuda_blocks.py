"""How decode attention is dealt out: blocks have the shared memory they ask for, on every kind of GPU."""

import itertools

import pytest

from jaxquant._kernels import cuda_blocks

# KB that all blocks of a multiprocessor can have together, and one of them: CUDA C++ Programming Guide, table of
# technical specifications per compute capability
ALL = {(8, 0): 164, (8, 6): 100, (8, 7): 164, (8, 9): 100, (9, 0): 228, (10, 0): 228, (12, 0): 100}
MOST = {(8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}


def static(shape: cuda_blocks.Shape, dim: int, heads: int, *, key_bits: int, trellis: bool = False) -> int:
    """Count what a block of `decode.cu` declares: queries, their fragments, tables of 8 bits, sums of warps."""
    queries = (4 if trellis else 2) * shape.columns * (dim + 8)
    words = -(-dim * (2 if key_bits == 3 else key_bits) // 32 // 4)  # of a key, of each of four lanes
    operands = words * {2: 4, 3: 4, 4: 2, 8: 0}[key_bits]
    fragments = 0 if trellis else 128 * operands * -(-min(heads, shape.columns) // 4)
    return queries + fragments + 2 * 512 + 8 * shape.warps * shape.columns + 4 * shape.columns


@pytest.mark.parametrize("capability", MOST)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_blocks_fit_into_shared_memory(capability, dim):
    widths = 2, 3, 4, 8
    # Blocks differ with up to 8 heads and with more, and the most heads of either ask for most.
    for heads, *bits, scales, wide in itertools.product((8, 16), widths, widths, (4, 6, 8), (False, True)):
        vector = sum(bits) * dim // 8 + scales
        shape = cuda_blocks.shape(dim, heads, vector, (0, 0), capability, wide=wide)
        declared = static(shape, dim, heads, key_bits=bits[0])
        assert shape.shared + declared <= 1024 * MOST[capability]
        each = shape.shared + declared + 1024  # that the system takes of each
        assert shape.blocks * each <= 1024 * ALL[capability]
        assert shape.shared >= shape.stages * shape.warps * shape.tile * vector
        assert shape.stages >= 2
        assert shape.warps >= 1


@pytest.mark.parametrize("windows", [(10, 10), (9, 0), (0, 10)])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("heads", [1, 8, 16])
def test_blocks_with_tables_fit_too(windows, dim, heads):
    vector = 2 * (dim // 4 + 2)
    shape = cuda_blocks.shape(dim, heads, vector, windows, (9, 0), wide=True)
    assert shape.shared + static(shape, dim, heads, key_bits=2, trellis=windows[0] > 0) <= 1024 * MOST[9, 0]
    assert shape.tile == cuda_blocks.TILE


@pytest.mark.parametrize(
    ("rows", "slots", "page", "wide"),
    [
        (8, 131_072, 0, True),
        (8, 4096, 0, False),
        (256, 131_071, 0, False),
        (256, 4096, 64, True),
        (256, 4096, 96, False),
        (4096, 56, 0, False),
        (256, 131_068, 0, False),
    ],
)
def test_wide_tiles_are_for_much_to_read(rows, slots, page, wide, monkeypatch):
    monkeypatch.setattr(cuda_blocks, "cores", lambda: 132)
    assert cuda_blocks.wide(rows, slots, page) == wide
    shape = cuda_blocks.shape(128, 4, 132, (0, 0), (9, 0), wide=wide)
    assert (shape.tile, shape.blocks) == ((64, 1) if wide else (32, 2))
