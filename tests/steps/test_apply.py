"""What a recipe leaves undecided has a default; what is decided is kept. Values stand in tests/golden."""

from dataclasses import replace

import torch

from bitwright.core.decisions import LinearDecision
from bitwright.core.grid import Grid, Tile
from bitwright.core.qtensor import QTensor
from bitwright.core.scheme import Scheme
from bitwright.steps.apply import quantize_linear
from bitwright.steps.ranges import minmax

WEIGHT = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
SCHEME = Scheme(Grid.integers(4), Tile(1, 8))


def applied(decision: LinearDecision, scheme: Scheme = SCHEME) -> QTensor:
    return quantize_linear(WEIGHT, decision, scheme, torch.bfloat16)


def same(one: QTensor, other: QTensor) -> bool:
    return torch.equal(one.codes, other.codes) and torch.equal(one.scale, other.scale)


def test_nothing_decided_is_round_to_nearest_on_the_schemes_tile() -> None:
    low, high = minmax(WEIGHT, SCHEME.tile)
    q = applied(LinearDecision())
    assert same(q, applied(LinearDecision(tile=SCHEME.tile, low=low, high=high)))
    assert (q.tile, q.grid, q.scale.shape) == (SCHEME.tile, SCHEME.weight, (8, 2))
    assert q.outlier_index is None and q.outlier_value is None


def test_a_range_narrower_than_the_weights_cuts_them_off() -> None:
    low, high = minmax(WEIGHT, SCHEME.tile)
    whole, half = applied(LinearDecision()), applied(LinearDecision(low=low / 2, high=high / 2))
    assert torch.allclose(half.scale.float(), whole.scale.float() / 2, rtol=0.01)
    assert half.dequantize().abs().max() < whole.dequantize().abs().max()
    middle = WEIGHT.abs() < 0.2
    errors = [(q.dequantize() - WEIGHT)[middle].float().square().mean() for q in (half, whole)]
    assert errors[0] < errors[1], "and what stays inside is finer"


def test_half_a_range_is_not_a_range() -> None:
    low, _ = minmax(WEIGHT, SCHEME.tile)
    assert same(applied(LinearDecision(low=low / 2)), applied(LinearDecision()))


def test_codes_that_are_decided_are_not_rounded_again() -> None:
    codes = torch.randint(0, 16, (8, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    q = applied(LinearDecision(codes=codes))
    assert q.codes is codes
    assert torch.equal(q.scale, applied(LinearDecision()).scale)


def test_no_outliers_are_no_outliers() -> None:
    none = applied(LinearDecision(outliers=torch.zeros(8, 16, dtype=torch.bool)))
    assert none.outlier_index is not None and len(none.outlier_index) == 0
    assert torch.equal(none.dequantize(), applied(LinearDecision()).dequantize())
    assert none.storage_bits == applied(LinearDecision()).storage_bits


def test_outliers_are_numbered_row_by_row() -> None:
    mask = torch.zeros(8, 16, dtype=torch.bool)
    mask[2, 3] = mask[0, 15] = mask[7, 0] = True
    q = applied(LinearDecision(outliers=mask))
    assert q.outlier_index is not None and q.outlier_value is not None
    assert q.outlier_index.tolist() == [15, 2 * 16 + 3, 7 * 16]
    assert q.outlier_index.dtype == torch.int32
    assert q.outlier_value.tolist() == [WEIGHT[0, 15].item(), WEIGHT[2, 3].item(), WEIGHT[7, 0].item()]


def test_the_decision_itself_is_not_changed() -> None:
    decision = LinearDecision(tile=Tile(2, 1))
    before = replace(decision)
    applied(decision)
    assert decision == before
