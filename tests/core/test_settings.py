"""Settings: what a declaration refuses, and what each preset has."""

from dataclasses import dataclass, fields

import pytest

from bitwright.core.errors import RecipeError
from bitwright.core.registry import modules
from bitwright.core.scheme import Scheme
from bitwright.core.settings import DECLARED, ESTABLISHED, Basis, Depends, Settings, known_settings, setting

BASIS = Basis(Scheme.parse("W3A16"))


@dataclass(frozen=True)
class Sample(Settings):
    share: float = setting(0.5, "a share", above=0, most=1)
    count: int = setting(1, "a count", least=1, wants="one is needed")
    how: str = setting("fast", "how", choices=("fast", "slow"), paper="slow")
    more: str | None = setting(None, "more", choices=("a", "b"))
    on: bool = setting(True, "whether", paper=False)
    bits: int = setting(0, "bits", bitwright=Depends("those of weights", lambda basis: basis.scheme.weight.bits))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"share": 0}, "share is 0; it is more than 0 and at most 1"),
        ({"share": 1.5}, "share is 1.5; it is more than 0 and at most 1"),
        ({"share": float("nan")}, "share is nan; it is more than 0 and at most 1"),
        ({"count": 0}, "count is 0; one is needed"),
        ({"how": "fats"}, "there is no how 'fats'; did you mean fast? Known: fast, slow"),
        ({"more": "c"}, "there is no more 'c'; Known: a, b"),
    ],
)
def test_values_that_are_not_allowed(value: dict[str, object], says: str) -> None:
    with pytest.raises(RecipeError) as error:
        Sample(**value)  # type: ignore[arg-type]
    with pytest.raises(RecipeError) as again:
        Sample.settled("paper", BASIS, value)
    assert str(error.value) == str(again.value) == says


def test_presets() -> None:
    assert Sample.settled("bitwright", BASIS, {}) == Sample(bits=3)
    assert Sample.settled("paper", BASIS, {}) == Sample(how="slow", on=False)
    assert Sample.settled("paper", BASIS, {"how": "fast", "epochs": 3}) == Sample(on=False), "others' keys are skipped"
    with pytest.raises(RecipeError, match="there are no training settings 'papr'; did you mean paper"):
        Sample.settled("papr", BASIS, {})


def test_defaults_in_words() -> None:
    declared = Sample.declared()
    shown = {key: each.shown_default() for key, each in declared.items()}
    assert shown == {
        "share": "0.5",
        "count": "1",
        "how": "fast; paper: slow",
        "more": "",
        "on": "on; paper: off",
        "bits": "those of weights; paper: 0",
    }
    assert declared["more"].kinds == (str, type(None)) and declared["on"].kinds == (bool,)


def test_every_setting_of_every_method_is_declared_and_explained() -> None:
    known = known_settings()
    assert tuple(known) == ESTABLISHED
    for name, module in modules("methods").items():
        assert module.METHOD.summary and ";" not in module.METHOD.summary, name
        assert all(DECLARED in field.metadata for field in fields(module.METHOD.settings)), name
    assert all(each.setting.help and not each.setting.help.endswith(".") for each in known.values())
