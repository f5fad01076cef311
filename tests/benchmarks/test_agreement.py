import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks.agreement import Expected, compared, expected, verdict

ROWS = torch.tensor([[0.0, 1.0, 2.0, 5.0], [3.0, 1.0, 2.9, 0.0], [0.0, 4.0, 1.0, 1.0]])
WANTED = Expected([3, 0, 1], ROWS, [1.0, 3.0])
ALIKE = {"tokens": [3, 0, 1], "nll": [1.0, 3.0], "logits": [0.0, 1.0, 2.0, 5.0]}


class Counting:
    """Says that token n + 1 follows token n, of six."""

    def __call__(self, tokens: torch.Tensor, use_cache: bool) -> Any:
        assert not use_cache
        return SimpleNamespace(logits=torch.nn.functional.one_hot((tokens + 1) % 6, 6).float())


def test_what_is_expected_follows_the_prompt() -> None:
    found = expected(Counting(), [2, 3], 4, [[0, 1, 2], [0, 0]])
    assert found.tokens == [4, 5, 0, 1]
    assert found.logits.argmax(1).tolist() == found.tokens
    normalizer = math.log(math.e + 5)
    assert found.nll == pytest.approx([normalizer - 1, normalizer])


def test_the_same_is_nowhere_apart() -> None:
    found = compared(WANTED, ALIKE)
    assert (found["alike"], found["of"], found["behind"], found["logits"], found["perplexity"]) == (
        3,
        3,
        None,
        0.0,
        0.0,
    )
    assert found["client_perplexity"] == pytest.approx(math.exp(2))
    assert verdict(found) == "passes"


def test_differences_are_measured_in_standard_deviations_and_per_cent() -> None:
    other = {"tokens": [3, 2, 1], "nll": [1.0, 3.02], "logits": [0.0, 1.0, 2.5, 5.0]}
    found = compared(WANTED, other)
    assert found["alike"] == 1
    assert found["behind"] == pytest.approx(0.1 / float(ROWS[1].std()))
    assert found["logits"] == pytest.approx(0.5 / float(ROWS[0].std()))
    assert found["perplexity"] == pytest.approx(100 * (math.exp(0.01) - 1))
    assert verdict(found) == "fails: tokens, perplexity"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": [3, 2, 1]}, "passes"),  # the logits agree
        ({"tokens": [3, 2, 1], "logits": None}, "passes"),  # nearly as likely
        ({"tokens": [3, 1, 1], "logits": None}, "fails: tokens"),
        ({"tokens": [3, 2, 1], "logits": [math.nan] * 4}, "fails: tokens"),
        ({"logits": [9.0, 1.0, 2.0, 5.0]}, "passes"),  # the tokens are alike
        ({"nll": [1.0, 3.009]}, "passes"),
        ({"nll": [1.0, 2.98]}, "fails: perplexity"),
        ({"nll": [1.0, math.nan]}, "fails: perplexity"),
    ],
)
def test_verdicts(change: dict[str, Any], said: str) -> None:
    assert verdict(compared(WANTED, ALIKE | change)) == said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": [3, 0]}, "3 tokens and 2 windows .* gave 2 and 2"),
        ({"nll": [1.0]}, "gave 3 and 1"),
        ({"logits": [0.0] * 5}, "4 logits, and the client gave 5"),
    ],
)
def test_a_result_of_another_shape_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        compared(WANTED, ALIKE | change)
