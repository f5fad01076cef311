"""Regular expressions of strangers: usual ones are taken, those that could take for ever are not."""

import re

import pytest

from bitwright.core import patterns
from bitwright.core.patterns import PatternError, check_patterns, checked

NAME_LENGTH = 90


@pytest.mark.parametrize("pattern", [
    ".*", "lm_head", r".*self_attn\.(q|k|v)_proj$", r"model\.layers\.\d+\.mlp\.experts\.\d+\.(gate|up)_proj.*",
    r"^(?!.*mlp).*$", r".*\.layers\.([0-9]|1[0-9])\..*", ".*q_proj.*|.*k_proj.*|.*v_proj.*|.*o_proj.*",
    "(" + "|".join(map(str, range(60))) + r")\.x", r"(\.\d+){2}", "[(*+]+x", r"\(a+\)+", "x{", "a{,5}", "(?:ab)+",
])  # fmt: skip
def test_usual_patterns_are_taken(pattern: str) -> None:
    assert checked(pattern, NAME_LENGTH).pattern == pattern


@pytest.mark.parametrize("pattern", [
    "(a+)+$", "(a|a)*$", "(a|ab)+", "(?:a?){30}a", "a?" * 30 + "a" * 30, "(a|a)" * 30, ".*.*.*.*.*.*x", "([a-z]+_?)*",
    "(?P<x>a*)*b", "((a{1,9})){2,}", "(?i:a+)+", "((ab)?c)*", "(?x)(a+) +", "(?x:(a+) +)", "(", "a" * 2000, "(a*){,9}",
])  # fmt: skip
def test_patterns_that_could_take_for_ever_are_not(pattern: str) -> None:
    with pytest.raises(PatternError, match="regular expression"):
        checked(pattern, NAME_LENGTH)


def test_names_in_the_form_of_patterns_are_no_patterns() -> None:
    names = [f"model.layers.{n}.q_proj" for n in range(20_000)]
    check_patterns({"dynamic": {f"+:^{re.escape(name)}$": {} for name in names}}, names)


def test_patterns_and_names_that_take_long_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "MOST_SECONDS", 0.0)
    with pytest.raises(PatternError, match=r"take more than 0 seconds for 2 tensors, at '\.\*x'"):
        check_patterns({"ignore": ["re:.*x"]}, ["a", "b"])
