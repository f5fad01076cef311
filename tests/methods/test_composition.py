from types import ModuleType

import pytest

from bitwright import methods
from bitwright.core.block import Block
from bitwright.core.decisions import BlockDecisions, Decision
from bitwright.core.errors import RecipeError
from bitwright.core.method import Closed, Context, Learnable, Learned, Method
from bitwright.core.recipe import Recipe
from bitwright.core.registry import names
from bitwright.core.settings import Settings
from bitwright.methods import let, lwc, rtn


def unchanged(block: Block, context: Context[Settings], decisions: BlockDecisions) -> BlockDecisions:
    return decisions


def nothing(block: Block, context: Context[Settings], decisions: BlockDecisions) -> Learnable:
    return Learnable({})


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> dict[str, Method]:
    """Methods of which one transforms, one chooses an axis, and one chooses ranges and rounds."""
    known: dict[str, Method] = {
        "turn": Learned(summary="", settings=Settings, decides=frozenset({Decision.TRANSFORM}), learn=nothing),
        "axis": Closed(summary="", settings=Settings, decides=frozenset({Decision.AXIS}), decide=unchanged),
        "round": Closed(
            summary="",
            settings=Settings,
            decides=frozenset({Decision.RANGE, Decision.ROUNDING}),
            decide=unchanged,
        ),
    }

    def found(room: str, name: str) -> ModuleType:
        assert room == "methods"
        module = ModuleType(name)
        vars(module)["METHOD"] = known[name]
        return module

    def listed(room: str) -> tuple[str, ...]:
        assert room == "methods"
        return tuple(sorted(known))

    monkeypatch.setattr(methods, "find", found)
    monkeypatch.setattr(methods, "names", listed)
    return known


def test_one_method() -> None:
    found = methods.compose("rtn")
    assert found.methods == {"rtn": rtn.METHOD}
    assert rtn.METHOD.decides == {Decision.ROUNDING}
    assert found.data_free and not found.needs_text and not found.learns


def test_a_preset_is_the_methods_it_stands_for() -> None:
    found = methods.compose("omniquant")
    assert found.methods == methods.compose("let+lwc").methods == {"let": let.METHOD, "lwc": lwc.METHOD}
    assert [method.decides for method in found.methods.values()] == [{Decision.TRANSFORM}, {Decision.RANGE}]
    assert found.named == "omniquant" and found.needs_text and found.learns and not found.data_free


@pytest.mark.parametrize("preset", methods.PRESETS)
def test_every_preset_can_be_composed_and_hides_no_method(preset: str) -> None:
    assert len(methods.compose(preset).methods) == len(methods.PRESETS[preset].split("+"))
    assert preset not in names("methods")


def test_methods_in_the_order_they_are_written(three: dict[str, Method]) -> None:
    assert list(methods.compose("turn + axis+round").methods.items()) == [*three.items()]


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


def test_methods_that_go_together_in_no_order_are_not_told_to_change_places() -> None:
    for text in ("awq+adadim", "adadim+awq"):
        with pytest.raises(RecipeError, match="they do not go together, keep one of them"):
            methods.compose(text)


@pytest.mark.parametrize(
    "text",
    [
        *("smoothquant+gptq", "awq+gptq", "lwc+gptq", "adadim+gptq", "adadim+lwc", "let+lwc+gptq", "smoothquant+rtn"),
        *("osplus+adadim+lwc+gptq", "adadim+rtn", "lwc+rtn", "smoothquant+lwc"),
        *("awq+lwc", "easyquant+lwc+gptq", "easyquant-outliers+adadim+gptq", "smoothquant+easyquant"),
    ],
)
def test_what_goes_together(text: str) -> None:
    assert len(methods.compose(text).methods) == len(text.split("+"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("gptq+awq", "awq decides the transform, which comes before the rounding that gptq has already decided"),
        ("gptq+adadim", "adadim decides the axis, which comes before the rounding that gptq has already decided"),
        ("lwc+adadim", "adadim decides the axis, which comes before the range that lwc has already decided"),
        ("smoothquant+let", "smoothquant and let both decide the transform"),
        ("awq+pact", "awq and pact both decide the range"),
        ("rtn+gptq", "rtn and gptq both decide the rounding"),
    ],
)
def test_what_does_not(text: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        methods.compose(text)


@pytest.mark.parametrize("text", ["rtm", "", "rtn+", "+rtn", "rtn,rtn", "RTN"])
def test_an_unknown_method_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"there is no method '.*Known: .*rtn"):
        methods.compose(text)


@pytest.mark.parametrize(("text", "meant"), [("rtm", "rtn"), ("let+lcw", "lwc"), ("omniqant", "omniquant")])
def test_an_unknown_method_is_refused_with_the_nearest_and_all_that_are_known(text: str, meant: str) -> None:
    with pytest.raises(RecipeError) as error:
        methods.compose(text)
    known = ", ".join(sorted({*names("methods"), *methods.PRESETS}))
    asked = text.rpartition("+")[2]
    assert str(error.value) == f"there is no method '{asked}'; did you mean {meant}? Known: {known}"


def test_round_to_nearest_twice_is_refused() -> None:
    with pytest.raises(RecipeError, match="rtn and rtn both decide"):
        methods.compose("rtn+rtn")


@pytest.mark.parametrize(
    ("method", "calibration", "composed"),
    [
        (None, None, "rtn"),
        (None, "t.txt", "omniquant"),
        ("rtn", "t.txt", "rtn"),
        ("let+lwc", "t.txt", "let+lwc"),
        ("omniquant", None, "omniquant"),
    ],
)
def test_the_method_is_the_one_named_or_follows_from_the_text(
    method: str | None, calibration: str | None, composed: str
) -> None:
    recipe = Recipe("m", "W4A16", method, calibration=calibration)
    assert methods.composed_for(recipe).named == composed
