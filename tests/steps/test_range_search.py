"""The range search: against every candidate tried by hand, and what it promises."""

import pytest
import torch
from torch import Tensor

from bitwright.core.grid import Tile
from bitwright.core.method import Moments
from bitwright.core.qtensor import affine, dequantize, quantize
from bitwright.core.scheme import Scheme
from bitwright.steps.range_search import COARSE, LARGEST, LOWEST, search
from bitwright.steps.ranges import minmax

GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(400, 64, generator=GENERATOR) @ torch.randn(64, 64, generator=GENERATOR) / 8
READ = INPUTS + 0.3 * INPUTS.roll(1, dims=1)
WEIGHT = torch.randn(24, 64, generator=GENERATOR) ** 3 / 20


def moments(x: Tensor, read: Tensor) -> Moments:
    return Moments(read.T @ read / len(x), (x - read).T @ read / len(x), len(x))


def quantized(low: Tensor, high: Tensor, scheme: Scheme, tile: Tile) -> Tensor:
    ends = minmax(WEIGHT, tile)
    scale, zero = affine(low * ends[0], high * ends[1], scheme.weight, torch.float32)
    return dequantize(quantize(WEIGHT, scale, zero, scheme.weight, tile), scale, zero, tile)


def error(found: Tensor, x: Tensor = INPUTS, read: Tensor = READ) -> float:
    return float((x @ WEIGHT.T - read @ found.T).double().square().sum())


def shares(scheme: Scheme, tile: Tile, value: float = LARGEST) -> Tensor:
    return torch.full(tile.counts((24, 64)), value)


@pytest.mark.parametrize("tile", [Tile(1, -1), Tile(1, 32), Tile(8, 1), Tile(24, 64), Tile(1, 40, True)], ids=str)
@pytest.mark.parametrize("text", ["W2A16", "W3A16", "W4A16sym", "mlc:q3f16_1"])
@pytest.mark.parametrize("start", [LARGEST, 0.5])
def test_the_linears_output_is_never_worse_than_at_the_start(text: str, tile: Tile, start: float) -> None:
    scheme = Scheme.parse(text)
    ones = shares(scheme, tile, start)
    low, high = search(WEIGHT, (ones, ones), scheme.weight, tile, torch.float32, moments(INPUTS, READ))
    before, after = error(quantized(ones, ones, scheme, tile)), error(quantized(low, high, scheme, tile))
    assert after < (0.95 if scheme.weight.bits < 4 else 0.999) * before
    assert low.min() > 0 and max(low.max(), high.max()) <= LARGEST


def test_the_start_is_left_as_it_was() -> None:
    scheme, tile = Scheme.parse("W2A16"), Tile(1, -1)
    ones = shares(scheme, tile)
    search(WEIGHT, (ones, ones), scheme.weight, tile, torch.float32, moments(INPUTS, READ))
    assert (ones == LARGEST).all()


def test_no_candidate_of_the_even_grid_is_better_alone() -> None:
    """At the end no tile of one row gains by moving either end to any place of the grid: the descent has descended."""
    scheme, tile = Scheme.parse("W2A16"), Tile(1, -1)
    ones = shares(scheme, tile)
    low, high = search(WEIGHT, (ones, ones), scheme.weight, tile, torch.float32, moments(INPUTS, READ))

    def rows(low: Tensor, high: Tensor) -> Tensor:
        return (INPUTS @ WEIGHT.T - READ @ quantized(low, high, scheme, tile).T).double().square().sum(0)

    least = rows(low, high)
    for share in torch.linspace(LOWEST, LARGEST, COARSE).tolist():
        moved = torch.full_like(low, share)
        for ends in ((moved, moved), (moved, high), (low, moved)):
            assert (rows(*ends) >= least - 1e-3).all()


def test_the_error_of_the_blocks_before_is_made_good() -> None:
    """With the drift known, the quantized linear on what it will read is nearer to the original on what it read."""
    scheme, tile = Scheme.parse("W3A16"), Tile(1, 16)
    ones = shares(scheme, tile)
    blind = Moments(moments(INPUTS, READ).inputs, torch.zeros(64, 64), len(INPUTS))
    seeing, unseeing = (
        error(quantized(*search(WEIGHT, (ones, ones), scheme.weight, tile, torch.float32, known), scheme, tile))
        for known in (moments(INPUTS, READ), blind)
    )
    assert seeing < 0.95 * unseeing
