"""Which weights are outliers: worked out by hand."""

import pytest
import torch

from bitwright.core.errors import RecipeError
from bitwright.core.outlier_rule import OutlierRule
from bitwright.steps.outliers import outliers


def rule(text: str) -> OutlierRule:
    found = OutlierRule.parse(text)
    assert found is not None
    return found


def test_three_standard_deviations_by_hand() -> None:
    """99 times 0 and once 10: mean 0.1, variance (99 * 0.01 + 98.01) / 100 = 0.99, so 10 lies 9.95 deviations away."""
    weight = torch.zeros(10, 10)
    weight[3, 4] = 10
    found = outliers(weight, rule("3"))
    assert found is not None
    assert found.nonzero().tolist() == [[3, 4]]
    assert outliers(weight, rule("9.9")) is not None
    assert outliers(weight, rule("10")) is None


def test_a_share_takes_those_furthest_from_the_mean() -> None:
    weight = torch.arange(100.0).view(10, 10)  # mean 49.5: 0 and 99 are furthest, then 1 and 98
    found = outliers(weight, rule("4%"))
    assert found is not None
    assert found.flatten().nonzero().flatten().tolist() == [0, 1, 98, 99]
    assert outliers(weight, rule("0.9%")) is None


@pytest.mark.parametrize("value", [0.0, 0.1, -3.0, 1e-20])
def test_weights_that_are_all_alike_have_none(value: float) -> None:
    assert outliers(torch.full((16, 8), value), rule("2")) is None


@pytest.mark.parametrize("text", ["0", "0%", " 0.0 "])
def test_none_asked(text: str) -> None:
    assert OutlierRule.parse(text) is None


@pytest.mark.parametrize(
    ("text", "said"), [("6%", "48 bits"), ("1", "48 bits"), ("many", "is no rule"), ("-3", "is no rule")]
)
def test_refused(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        OutlierRule.parse(text)
