from types import ModuleType

import pytest

from bitwright import methods
from bitwright.core.block import Block
from bitwright.core.decisions import BlockDecisions, Decision
from bitwright.core.errors import RecipeError
from bitwright.core.method import Context, Method
from bitwright.methods import rtn


def unchanged(block: Block, context: Context, decisions: BlockDecisions) -> BlockDecisions:
    return decisions


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> dict[str, Method]:
    """Methods of which one transforms, one chooses an axis, and one chooses ranges and rounds."""
    known = {
        "turn": Method(frozenset({Decision.TRANSFORM}), unchanged),
        "axis": Method(frozenset({Decision.AXIS}), unchanged, needs_text=True),
        "round": Method(frozenset({Decision.RANGE, Decision.ROUNDING}), unchanged),
    }

    def found(room: str, name: str) -> ModuleType:
        assert room == "methods"
        module = ModuleType(name)
        module.METHOD = known[name]  # type: ignore[attr-defined]
        return module

    monkeypatch.setattr(methods, "find", found)
    return known


def test_one_method() -> None:
    assert methods.compose("rtn") == (rtn.METHOD,)
    assert rtn.METHOD.decides == {Decision.RANGE, Decision.ROUNDING}
    assert not rtn.METHOD.needs_text


def test_methods_in_the_order_they_are_written(three: dict[str, Method]) -> None:
    assert methods.compose("turn + axis+round") == (three["turn"], three["axis"], three["round"])


def test_two_writers_of_one_decision_are_refused(three: dict[str, Method]) -> None:
    with pytest.raises(RecipeError, match="round and round both decide the range; keep one of them"):
        methods.compose("round+round")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("axis+turn", "turn decides the transform, which comes before the axis that .*; write turn[+]axis"),
        (
            "round+axis",
            "axis decides the axis, which comes before the (range|rounding) that .*; write axis[+]round",
        ),
        ("round+turn", "turn decides the transform, which comes before the (range|rounding) that round"),
    ],
)
def test_an_order_that_cannot_work_is_refused(three: dict[str, Method], text: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        methods.compose(text)


@pytest.mark.parametrize("text", ["rtm", "", "rtn+", "+rtn", "rtn,rtn", "RTN"])
def test_an_unknown_method_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"there is no method '.*Known: .*rtn"):
        methods.compose(text)


def test_round_to_nearest_twice_is_refused() -> None:
    with pytest.raises(RecipeError, match="rtn and rtn both decide"):
        methods.compose("rtn+rtn")
