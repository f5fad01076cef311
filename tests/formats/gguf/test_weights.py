"""Quantized linears in blocks: what is held to the bit, what is rounded, what is refused; read back by the library."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize

from bitwright.core.decisions import LinearDecision
from bitwright.core.errors import CheckpointError, RecipeError
from bitwright.core.grid import FULL, Grid, Levels, Tile, Zero
from bitwright.core.qtensor import QTensor
from bitwright.core.scheme import Scheme
from bitwright.formats import gguf
from bitwright.formats.gguf.weights import held, holds, kind_of
from bitwright.steps.apply import quantize_linear

ROWS, COLUMNS = 12, 192
EXACT = [Grid.integers(bits, True) for bits in range(2, 9)] + [Grid.integers(bits) for bits in (2, 3, 5, 6, 7)]
TILES = [Tile(1, 32), Tile(1, 64), Tile(1, 96), Tile(1, FULL)]


def made(grid: Grid, tile: Tile, outliers: bool = False, dtype: torch.dtype = torch.bfloat16) -> QTensor:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(4)) * 0.05 + 0.01
    mask = weight.abs() > 0.15 if outliers else None
    return quantize_linear(weight, LinearDecision(outliers=mask), Scheme(grid, tile), dtype)


def read(data: np.ndarray, kind: Kind) -> torch.Tensor:
    if kind is Kind.F16:
        return torch.from_numpy(data.view(np.float16).astype(np.float32))
    return torch.from_numpy(dequantize(data, kind))


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("grid", EXACT, ids=str)
def test_held_to_the_bit(grid: Grid, tile: Tile) -> None:
    q, kind = made(grid, tile), kind_of(grid, COLUMNS)
    assert kind in (Kind.Q4_0, Kind.Q8_0) and holds(grid, tile, False)
    found = held("x", q, kind, lossy=False)
    assert (found.difference.codes, found.difference.error) == (True, 0.0)
    assert torch.equal(read(found.data, kind), q.dequantize(torch.float32))


def test_few_bits_take_the_smaller_blocks() -> None:
    assert {kind_of(grid, COLUMNS) for grid in EXACT if grid.bits <= 3 or grid == Grid.integers(4, True)} == {Kind.Q4_0}
    assert kind_of(Grid.integers(4), COLUMNS) is Kind.Q4_1
    assert gguf.stored_bytes((8, 64), Scheme.parse("W3A16g64"), torch.float16) == 8 * 2 * 18


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_four_bits_with_a_zero_point_keep_their_codes_and_the_rounding_is_measured(tile: Tile) -> None:
    q = made(Grid.integers(4), tile, dtype=torch.float16)
    found = held("x", q, Kind.Q4_1, lossy=False)
    values, exact = read(found.data, Kind.Q4_1).double(), q.dequantize(torch.float32).double()
    error = float((values - exact).square().sum() / exact.square().sum())
    assert found.difference.codes
    assert 0 < found.difference.error < 1e-6
    assert found.difference.error == pytest.approx(error)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_on_the_adapted_grid_nothing_is_lost(tile: Tile) -> None:
    scheme = gguf.adapted(Scheme(Grid.integers(4), tile))
    q = made(scheme.weight, tile, dtype=torch.float16)
    found = held("x", q, Kind.Q4_1, lossy=False)
    assert found.difference.error == 0.0
    np.testing.assert_array_equal(dequantize(found.data, Kind.Q4_1), q.dequantize(torch.float32).numpy())


def test_other_grids_are_not_adapted() -> None:
    for text in ("W4A16g64sym", "W3A16g64", "W8A16sym", "W5A16"):
        assert gguf.adapted(Scheme.parse(text)) == Scheme.parse(text)


def test_rows_in_another_order() -> None:
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(6))
    for grid in (Grid.integers(4), Grid.integers(8, True)):
        q, kind = made(grid, Tile(1, 64)), kind_of(grid, COLUMNS)
        straight = read(held("x", q, kind, False).data, kind)
        assert torch.equal(read(held("x", q, kind, False, order).data, kind), straight[order])


HARD = {
    "outliers": made(Grid.integers(4, True), Tile(1, 32), outliers=True),
    "groups along the output": made(Grid.integers(4), Tile(6, 1)),
    "groups of 48": made(Grid.integers(3), Tile(1, 48)),
    "groups of 16": made(Grid.integers(4), Tile(1, 16)),
    "8 bits": made(Grid.integers(8), Tile(1, 32)),
}


@pytest.mark.parametrize("what", HARD)
def test_what_cannot_be_held_is_refused_or_its_loss_measured(what: str) -> None:
    q = HARD[what]
    kind, order = kind_of(q.grid, COLUMNS), torch.randperm(ROWS, generator=torch.Generator().manual_seed(6))
    assert not holds(q.grid, q.tile, q.outlier_index is not None)
    with pytest.raises(RecipeError, match=r"x: .* cannot be held exactly in GGUF.*--lossy"):
        held("x", q, kind, lossy=False)
    found = held("x", q, kind, lossy=True, order=order)
    values, exact = read(found.data, kind).double(), q.dequantize(torch.float32)[order].double()
    error = float((values - exact).square().sum() / exact.square().sum())
    assert not found.difference.codes
    assert 0 < found.difference.error < 0.02
    assert found.difference.error == pytest.approx(error)


def test_blocks_without_outliers_keep_their_codes() -> None:
    q = HARD["outliers"]
    assert q.outlier_index is not None
    values = read(held("x", q, Kind.Q4_0, lossy=True).data, Kind.Q4_0).view(ROWS, -1, 32)
    exact = q.dequantize(torch.float32).view(ROWS, -1, 32)
    touched = torch.zeros(ROWS * COLUMNS, dtype=torch.bool)
    touched[q.outlier_index.long()] = True
    changed = touched.view(ROWS, -1, 32).any(-1)
    assert 0 < changed.sum() < changed.numel()
    assert torch.equal(values[~changed], exact[~changed])
    assert ((values != exact).any(-1) == changed).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_further_level_above_is_held_with_the_signs_turned(bits: int) -> None:
    """Symmetric levels of which one more is above zero than below, the scale of either sign."""
    generator = torch.Generator().manual_seed(8)
    grid = Grid(Levels(1 - 2 ** (bits - 1), 2 ** (bits - 1)), zero=Zero.NONE)
    codes = torch.randint(grid.qmin, grid.qmax + 1, (ROWS, COLUMNS), generator=generator).to(torch.int16)
    q = QTensor(codes, torch.randn(ROWS, COLUMNS // 32, generator=generator).half(), None, grid, Tile(1, 32))
    kind = kind_of(grid, COLUMNS)
    assert kind is (Kind.Q8_0 if bits == 8 else Kind.Q4_0) and holds(grid, q.tile, False)
    found = held("x", q, kind, lossy=False)
    assert found.difference.error == 0.0
    assert torch.equal(read(found.data, kind), q.dequantize(torch.float32))


def test_eight_bits_with_zero_points_are_kept_where_they_happen_to_fit() -> None:
    q = made(Grid.integers(8), Tile(1, 32))
    assert q.zero is not None
    near = replace(q, codes=(q.codes // 2), zero=(q.zero // 2))
    found = held("x", near, Kind.Q8_0, lossy=False)
    assert found.difference.codes and found.difference.error == 0.0
    assert torch.equal(read(found.data, Kind.Q8_0), near.dequantize(torch.float32))


def test_rows_of_no_whole_blocks_become_float16() -> None:
    weight = torch.randn(4, 40, generator=torch.Generator().manual_seed(5))
    q = quantize_linear(weight, LinearDecision(), Scheme(Grid.integers(4, True), Tile(1, FULL)), torch.bfloat16)
    assert kind_of(q.grid, 40) is Kind.F16
    with pytest.raises(RecipeError, match="cannot be held"):
        held("x", q, Kind.F16, lossy=False)
    found = held("x", q, Kind.F16, lossy=True)
    assert found.difference.error < 1e-6
    torch.testing.assert_close(read(found.data, Kind.F16), q.dequantize(torch.float32), rtol=1e-3, atol=0)


def test_scales_of_float32_are_rounded_and_measured_and_too_large_ones_refused() -> None:
    q = made(Grid.integers(4, True), Tile(1, 32), dtype=torch.float32)
    assert 0 < held("x", q, Kind.Q4_0, lossy=False).difference.error < 1e-6
    with pytest.raises(CheckpointError, match="more than float16 holds"):
        held("x", replace(q, scale=q.scale * 1e9), Kind.Q4_0, lossy=False)


def _times(q: QTensor, factor: float) -> QTensor:
    return replace(q, scale=q.scale * factor)


SMALL = {
    "4 bits": (made(Grid.integers(4, True), Tile(1, 32), dtype=torch.float32), Kind.Q4_0),
    "zero points": (made(Grid.integers(4), Tile(1, 32), dtype=torch.float32), Kind.Q4_1),
    "8 bits": (made(Grid.integers(8, True), Tile(1, 32), dtype=torch.float32), Kind.Q8_0),
    "quantized once more": (_times(made(Grid.integers(4), Tile(1, 16), dtype=torch.float32), 0.1), Kind.Q4_1),
    "quantized once more to 8 bits": (made(Grid.integers(8), Tile(1, 32), dtype=torch.float32), Kind.Q8_0),
    "in 16 bits": (made(Grid.integers(4, True), Tile(1, FULL), dtype=torch.float32), Kind.F16),
}


@pytest.mark.parametrize("what", SMALL)
@pytest.mark.parametrize("times", [1e-8, 1e-5])
def test_scales_too_small_for_float16_are_refused(what: str, times: float) -> None:
    """Zero in float16, or so small that few of its numbers are left; a little larger they are rounded and measured."""
    q, kind = SMALL[what]
    ways = (False, True) if holds(q.grid, q.tile, False) and kind is not Kind.F16 else (True,)
    for lossy in ways:
        with pytest.raises(CheckpointError, match=r"x: its scales are too small for float16, .*largest "):
            held("x", _times(q, times), kind, lossy=lossy)
        assert 0 < held("x", _times(q, 0.05), kind, lossy=lossy).difference.error < 0.02


def test_a_row_that_is_next_to_nothing_is_not_what_a_linear_is_refused_for() -> None:
    q = made(Grid.integers(4, True), Tile(1, 32), dtype=torch.float32)
    q.scale[3] *= 1e-9
    assert 0 < held("x", q, Kind.Q4_0, lossy=False).difference.error < 1e-6
