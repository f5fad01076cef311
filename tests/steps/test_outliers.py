"""Which weights are outliers: worked out by hand."""

import pytest
import torch
from torch import Tensor

from bitwright.core.errors import RecipeError
from bitwright.core.outlier_rule import OutlierRule
from bitwright.steps.outliers import bounds, outliers


def rule(text: str) -> OutlierRule:
    found = OutlierRule.parse(text)
    assert found is not None
    return found


def found_in(weight: Tensor, text: str, rows: int = 1000) -> Tensor | None:
    return outliers(weight, bounds(lambda: weight.split(rows), rule(text)))


def test_three_standard_deviations_by_hand() -> None:
    """99 times 0 and once 10: mean 0.1, variance (99 * 0.01 + 98.01) / 100 = 0.99, so 10 lies 9.95 deviations away."""
    weight = torch.zeros(10, 10)
    weight[3, 4] = 10
    found = found_in(weight, "3")
    assert found is not None
    assert found.nonzero().tolist() == [[3, 4]]
    assert found_in(weight, "9.9") is not None
    assert found_in(weight, "10") is None


def test_a_share_takes_those_furthest_from_the_mean() -> None:
    weight = torch.arange(100.0).view(10, 10)  # mean 49.5: 0 and 99 are furthest, then 1 and 98
    found = found_in(weight, "4%")
    assert found is not None
    assert found.flatten().nonzero().flatten().tolist() == [0, 1, 98, 99]
    assert found_in(weight, "0.9%") is None


@pytest.mark.parametrize("text", ["2.5", "3", "1%", "0.3%"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_panels_change_nothing(text: str, dtype: torch.dtype) -> None:
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole, parts = found_in(weight, text), found_in(weight, text, rows=7)
    assert whole is not None
    assert parts is not None
    assert torch.equal(whole, parts)
    if "%" in text:  # bfloat16 has many weights that lie equally far
        assert 0.4 * float(text[:-1]) / 100 < whole.float().mean() <= float(text[:-1]) / 100


@pytest.mark.parametrize("value", [0.0, 0.1, -3.0, 1e-20])
def test_weights_that_are_all_alike_have_none(value: float) -> None:
    assert found_in(torch.full((16, 8), value), "2") is None


@pytest.mark.parametrize("text", ["0", "0%", " 0.0 "])
def test_none_asked(text: str) -> None:
    assert OutlierRule.parse(text) is None


@pytest.mark.parametrize(
    ("text", "said"), [("6%", "48 bits"), ("1", "48 bits"), ("many", "is no rule"), ("-3", "is no rule")]
)
def test_refused(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        OutlierRule.parse(text)


@pytest.mark.parametrize("factor", [2.0**-100, 2.0**-60, 2.0**60, 2.0**100])
def test_weights_of_any_size_have_the_same(factor: float) -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    plain, scaled = (bounds([w].copy, OutlierRule(3.0)) for w in (weight, weight * factor))
    assert scaled.distance / factor == pytest.approx(plain.distance, rel=1e-6)
    expected, found = outliers(weight, plain), outliers(weight * factor, scaled)
    assert expected is not None and found is not None and torch.equal(found, expected)
