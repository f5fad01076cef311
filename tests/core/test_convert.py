"""The same weight on other terms: by hand, and with random codes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitwright.core.convert import difference, on_grid, relative_error, split, with_scales
from bitwright.core.grid import FULL, Grid, Tile
from bitwright.core.qtensor import QTensor


def drawn(seed: int, grid: Grid, tile: Tile, shape: tuple[int, int] = (8, 64)) -> QTensor:
    generator = torch.Generator().manual_seed(seed)
    counts = tile.counts(shape)
    codes = torch.randint(grid.qmin, grid.qmax + 1, shape, generator=generator)
    zero = None if grid.symmetric else torch.randint(grid.qmin, grid.qmax + 1, counts, generator=generator)
    scale = torch.rand(counts, generator=generator) + 0.5
    kind = torch.int8 if grid.symmetric else torch.uint8
    return QTensor(codes.to(kind), scale, None if zero is None else zero.to(kind), grid, tile)


@given(st.integers(0, 99), st.integers(2, 8), st.integers(2, 8), st.booleans(), st.booleans())
def test_another_grid_stands_for_the_same_weight_or_is_refused(
    seed: int, bits: int, to: int, symmetric: bool, to_symmetric: bool
) -> None:
    weight = drawn(seed, Grid.integers(bits, symmetric), Tile(1, 32))
    moved = on_grid(weight, Grid.integers(to, to_symmetric))
    if moved is None:
        assert to < bits or (to == bits and to_symmetric and not symmetric), "a finer grid has room for every level"
        return
    assert int(moved.codes.min()) >= moved.grid.qmin and int(moved.codes.max()) <= moved.grid.qmax
    torch.testing.assert_close(moved.dequantize(), weight.dequantize(), rtol=0, atol=0)


def test_symmetric_codes_as_asymmetric_ones_by_hand() -> None:
    weight = QTensor(
        torch.tensor([[-8, 0, 7]], dtype=torch.int8), torch.ones(1, 1), None, Grid.integers(4, True), Tile(1, FULL)
    )
    moved = on_grid(weight, Grid.integers(4))
    assert moved is not None and moved.zero is not None
    assert moved.codes.tolist() == [[0, 8, 15]] and moved.zero.tolist() == [[8]]


def test_asymmetric_levels_that_leave_a_symmetric_grid_are_refused() -> None:
    codes, zero = torch.tensor([[0, 15]], dtype=torch.uint8), torch.tensor([[2]], dtype=torch.uint8)
    weight = QTensor(codes, torch.ones(1, 1), zero, Grid.integers(4), Tile(1, FULL))
    assert on_grid(weight, Grid.integers(4, True)) is None
    moved = on_grid(weight, Grid.integers(5, True))
    assert moved is not None and moved.codes.tolist() == [[-2, 13]]


@pytest.mark.parametrize("grid", [Grid.integers(4), Grid.integers(3, True)], ids=str)
def test_scales_are_repeated_in_smaller_tiles(grid: Grid) -> None:
    weight = drawn(1, grid, Tile(1, FULL))
    smaller = split(weight, Tile(1, 16))
    assert smaller is not None and smaller.scale.shape == (8, 4)
    torch.testing.assert_close(smaller.dequantize(), weight.dequantize(), rtol=0, atol=0)
    assert split(smaller, Tile(1, 32)) is None and split(weight, Tile(8, 1)) is None


def test_what_rounded_scales_lose_is_measured() -> None:
    weight = drawn(2, Grid.integers(4), Tile(1, 32))
    lost = difference("x", weight, with_scales(weight, torch.float16))
    assert lost.codes and 0 < lost.error < 2**-22
    assert difference("x", weight, weight).error == 0
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0 and relative_error(torch.zeros(2), torch.ones(2)) > 1e9
