"""What holds for every weight, bits, tile and dtype; values are compared with a golden implementation elsewhere."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bitwright.core.decisions import LinearDecision
from bitwright.core.errors import SchemeError
from bitwright.core.grid import FULL, Grid, Tile
from bitwright.core.qtensor import QTensor, affine, dequantize, quantize, tiled
from bitwright.core.scheme import Scheme
from bitwright.steps.apply import quantize_linear
from bitwright.steps.ranges import minmax

ROWS, COLUMNS = 4, 6
TILES = st.sampled_from([Tile(1, FULL), Tile(1, 2), Tile(1, 3), Tile(2, 1), Tile(4, 1), Tile(FULL, FULL), Tile(2, 3)])
GRIDS = st.builds(Grid.integers, st.integers(2, 8), st.booleans())
DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])


few = settings(max_examples=50)


def numbers(largest: float) -> st.SearchStrategy[float]:
    """Ordinary numbers, and the ones that hurt: zeros, both ends, denormal numbers of every dtype."""
    ordinary = st.floats(-4, 4, width=32)
    ends = [0.0, -0.0, largest, -largest, 2.0**-149, 2.0**-133, 2.0**-126, 2.0**-24, -(2.0**-24), 2.0**-14, 1.0]
    return ordinary | st.sampled_from(ends) | st.floats(-largest, largest, width=32)


def weights(largest: float) -> st.SearchStrategy[torch.Tensor]:
    """Arrays with a number that most cells share, and others in some places."""
    cells = arrays(np.float32, (ROWS, COLUMNS), elements=numbers(largest), fill=numbers(largest))
    return cells.map(lambda each: torch.from_numpy(each.copy()))


def rounded(weight: torch.Tensor, grid: Grid, tile: Tile, dtype: torch.dtype, **decided: Any) -> QTensor:
    return quantize_linear(weight.to(dtype), LinearDecision(**decided), Scheme(grid, tile), dtype)


def spread(per_tile: torch.Tensor, tile: Tile) -> torch.Tensor:
    t_o, t_i = tile.size((ROWS, COLUMNS))
    return per_tile.double().repeat_interleave(t_o, 0).repeat_interleave(t_i, 1)


@few
@given(weights(2.0**14), GRIDS, TILES, DTYPES)
def test_error_is_at_most_half_a_step_and_what_rounding_the_scale_cuts_off(
    weight: torch.Tensor, grid: Grid, tile: Tile, dtype: torch.dtype
) -> None:
    """With h the stored scale, [low, high] the range and n steps:

    Inside the range of codes the error is at most h/2. Rounding h down to its dtype leaves n·h short of high - low, by
    at most (high - low)·u + n·d, with u the dtype's relative rounding (eps/2) and d half its smallest step; rounding z
    shifts by up to h/2 more, at one end only: a weight there is off by at most h/2 + (high - low)·u + n·d.
    """
    q = rounded(weight, grid, tile, dtype)
    exact = weight.to(dtype).double()
    info = torch.finfo(dtype)
    low, high = (spread(end, tile) for end in minmax(weight.to(dtype), tile))
    low, high = low.clamp(max=0), high.clamp(min=0)
    extent = 2 * torch.maximum(-low, high) if grid.symmetric else high - low
    h = spread(q.scale, tile)
    # Float32 takes part in the step (two operations) and in the quotient (up to n, whose half it may miss by n·2**-24).
    slack = extent * 2.0**-22 + h * grid.steps * 2.0**-23
    bound = h / 2 + extent * (info.eps / 2) + grid.steps * (info.tiny * info.eps / 2) + slack
    error = (q.dequantize(torch.float64) - exact).abs()
    assert (error <= bound).all(), (error - bound).max()


@few
@given(weights(2.0**14), GRIDS, TILES, DTYPES)
def test_codes_and_zero_points_stay_on_the_grid(
    weight: torch.Tensor, grid: Grid, tile: Tile, dtype: torch.dtype
) -> None:
    q = rounded(weight, grid, tile, dtype)
    assert int(q.codes.min()) >= grid.qmin and int(q.codes.max()) <= grid.qmax
    assert (q.scale > 0).all()
    assert q.scale.dtype == dtype
    assert (q.zero is None) == grid.symmetric
    if q.zero is not None:
        assert int(q.zero.min()) >= 0 and int(q.zero.max()) <= grid.qmax


@few
@given(weights(2.0**14), GRIDS, TILES, DTYPES, st.lists(st.integers(0, ROWS * COLUMNS - 1), max_size=8))
def test_zero_stays_zero(weight: torch.Tensor, grid: Grid, tile: Tile, dtype: torch.dtype, places: list[int]) -> None:
    weight.view(-1)[places] = 0
    values = rounded(weight, grid, tile, dtype).dequantize()
    assert (values[weight == 0] == 0).all()


@few
@given(GRIDS, TILES, DTYPES)
def test_zeros_are_exact(grid: Grid, tile: Tile, dtype: torch.dtype) -> None:
    q = rounded(torch.zeros(ROWS, COLUMNS), grid, tile, dtype)
    assert (q.dequantize() == 0).all()
    assert (q.scale == 1).all()


@few
@given(st.floats(-(2.0**10), 2.0**10, width=16), st.integers(2, 8), TILES, DTYPES)
def test_one_value_everywhere(value: float, bits: int, tile: Tile, dtype: torch.dtype) -> None:
    """The range is [0, c] and c has the last code: off by what rounding c/n to the scale's dtype makes of it, no more,
    and exact where n·(c/n) is."""
    weight = torch.full((ROWS, COLUMNS), value).to(dtype)
    c, info = float(weight[0, 0]), torch.finfo(dtype)
    q = rounded(weight, Grid.integers(bits), tile, dtype)
    error = (q.dequantize(torch.float64) - c).abs()
    steps = 2**bits - 1
    assert (error <= abs(c) * info.eps / 2 * (1 + 2.0**-10) + steps * max(info.tiny * info.eps, info.tiny / 2)).all()
    exact = rounded(torch.full((ROWS, COLUMNS), float(steps)), Grid.integers(bits), tile, dtype)
    assert (exact.dequantize() == steps).all()


@few
@given(st.data(), GRIDS, TILES, DTYPES)
def test_no_weight_gives_nan_or_infinity(data: st.DataObject, grid: Grid, tile: Tile, dtype: torch.dtype) -> None:
    # Half of the largest number: a code beyond the range stands for up to 4/3 of it (see the next test).
    weight = data.draw(weights(torch.finfo(dtype).max / 2))
    q = rounded(weight, grid, tile, dtype)
    assert q.scale.isfinite().all()
    assert q.dequantize().isfinite().all()
    assert q.dequantize(torch.float32).isfinite().all()


@pytest.mark.parametrize(
    ("grid", "dtype", "largest"),
    [
        # h = max/7 is rounded up in bfloat16, and 7h is beyond the largest number.
        (Grid.integers(3), torch.bfloat16, torch.finfo(torch.bfloat16).max),
        # h = 2*60000/3 = 40000 and -60000/40000 = -1.5 takes the code -2: -80000, in a dtype that ends at 65504.
        (Grid.integers(2, symmetric=True), torch.float16, 60000.0),
    ],
    ids=["asym", "sym"],
)
def test_the_largest_numbers_stay_finite(grid: Grid, dtype: torch.dtype, largest: float) -> None:
    weight = torch.tensor([[largest, 0.0], [-largest, 0.0]])
    assert rounded(weight, grid, Tile(1, FULL), dtype).dequantize().isfinite().all()


@few
@given(weights(2.0**14), GRIDS, TILES, DTYPES, st.sets(st.integers(0, ROWS * COLUMNS - 1)))
def test_outliers_are_exact_and_the_rest_is_quantized_as_if_they_were_zero(
    weight: torch.Tensor, grid: Grid, tile: Tile, dtype: torch.dtype, places: set[int]
) -> None:
    mask = torch.zeros(ROWS * COLUMNS, dtype=torch.bool)
    mask[list(places)] = True
    mask = mask.view(ROWS, COLUMNS)
    without = weight.masked_fill(mask, 0.0)
    plain, kept = rounded(without, grid, tile, dtype), rounded(weight, grid, tile, dtype, outliers=mask)
    values = kept.dequantize()
    assert torch.equal(values[mask], weight.to(dtype)[mask])
    assert torch.equal(values[~mask], plain.dequantize()[~mask])
    assert kept.outlier_value is not None and kept.outlier_value.dtype == dtype


def whole_words(bits: int) -> int:
    """The bits of as many 32-bit words as hold so many."""
    return len(range(0, bits, 32)) * 32


@few
@given(GRIDS, TILES, DTYPES, st.integers(0, ROWS * COLUMNS))
@example(Grid.integers(4), Tile(1, 2), torch.float32, 3)
def test_storage_counts_everything(grid: Grid, tile: Tile, dtype: torch.dtype, outliers: int) -> None:
    mask = torch.zeros(ROWS * COLUMNS, dtype=torch.bool)
    mask[:outliers] = True
    q = rounded(torch.ones(ROWS, COLUMNS), grid, tile, dtype, outliers=mask.view(ROWS, COLUMNS))
    p, columns = tile.counts((ROWS, COLUMNS))
    bits = ROWS * whole_words(COLUMNS * grid.bits) + p * columns * dtype.itemsize * 8
    bits += outliers * (32 + dtype.itemsize * 8) + (0 if grid.symmetric else columns * whole_words(p * grid.bits))
    assert q.storage_bits == bits
    assert q.bits_per_weight == bits / (ROWS * COLUMNS)


@few
@given(weights(4.0), GRIDS, TILES, DTYPES)
def test_quantizing_again_changes_nothing(weight: torch.Tensor, grid: Grid, tile: Tile, dtype: torch.dtype) -> None:
    """Codes of what the codes stand for are the same codes: with the same scale and zero point nothing wanders."""
    q = rounded(weight, grid, tile, dtype)
    values = q.dequantize(torch.float32)
    assert torch.equal(quantize(values, q.scale, q.zero, grid, tile), q.codes)


@few
@given(weights(4.0), TILES)
def test_tiles_are_views_that_hold_every_weight_once(weight: torch.Tensor, tile: Tile) -> None:
    view = tiled(weight, tile)
    t_o, t_i = tile.size((ROWS, COLUMNS))
    assert view.shape == (ROWS // t_o, t_o, COLUMNS // t_i, t_i)
    assert view.data_ptr() == weight.data_ptr()
    p, q = ROWS // t_o - 1, COLUMNS // t_i - 1
    assert torch.equal(view[p, :, q, :], weight[p * t_o :, q * t_i :])


@few
@given(weights(4.0), GRIDS, TILES)
def test_nothing_that_is_given_is_changed(weight: torch.Tensor, grid: Grid, tile: Tile) -> None:
    before = weight.clone()
    q = rounded(weight, grid, tile, torch.float32)
    codes, zero = q.codes.clone(), None if q.zero is None else q.zero.clone()
    q.dequantize()
    dequantize(q.codes, q.scale, q.zero, tile)
    assert torch.equal(weight, before)
    assert torch.equal(q.codes, codes)
    assert zero is None or (q.zero is not None and torch.equal(q.zero, zero))


def test_ranges_are_made_to_contain_zero() -> None:
    scale, zero = affine(torch.tensor([[2.0]]), torch.tensor([[6.0]]), Grid.integers(2), torch.float32)
    assert zero is not None
    assert (scale.item(), zero.item()) == (2.0, 0)
    scale, zero = affine(torch.tensor([[-6.0]]), torch.tensor([[-2.0]]), Grid.integers(2), torch.float32)
    assert zero is not None
    assert (scale.item(), zero.item()) == (2.0, 3)


def test_a_tile_that_does_not_divide_the_weight_is_refused() -> None:
    with pytest.raises(SchemeError, match="6 input features do not divide into groups of 4"):
        rounded(torch.ones(ROWS, COLUMNS), Grid.integers(4), Tile(1, 4), torch.float32)


@pytest.mark.parametrize("bits", range(2, 8))
@pytest.mark.parametrize("symmetric", [False, True])
def test_more_bits_are_more_exact(bits: int, symmetric: bool) -> None:
    """Half the step is a quarter of the squared error: some factor 4 a bit, 3 at the very least."""
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))

    def error(bits: int) -> float:
        values = rounded(weight, Grid.integers(bits, symmetric), Tile(1, FULL), torch.float32).dequantize()
        return float((values - weight).square().sum())

    assert error(bits) > 3 * error(bits + 1)
