"""A method that is added in one file, with a setting nobody else has: everything that takes settings takes it."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from tests.cli.conftest import SCHEME, Run

from bitwright import Recipe, methods
from bitwright.core.errors import RecipeError
from bitwright.core.settings import known_settings

Add = Callable[[str, str], None]
SOURCE = '''
"""A method that halves its ranges so many times."""
from dataclasses import dataclass, replace
from bitwright.core.decisions import Decision
from bitwright.core.method import DataFree
from bitwright.core.settings import Depends, Settings, setting
from bitwright.steps.ranges import minmax

@dataclass(frozen=True)
class HalvingSettings(Settings):
    halvings: int = setting(
        2, "how often ranges are halved", least=0,
        bitwright=Depends("2, 1 at 4 bits", lambda basis: 1 if basis.scheme.weight.bits == 4 else 2), paper=0,
    )

def decide(weight, context, decided):
    low, high = minmax(weight, context.scheme.tile)
    by = 0.5 ** context.settings.halvings
    return replace(decided, low=low * by, high=high * by)

METHOD = DataFree(
    summary="halve ranges", settings=HalvingSettings, decides=frozenset({Decision.RANGE}), decide=decide
)
'''


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Add]:
    """``add(name, source)`` puts a file into the room of methods while a test runs."""
    room = tmp_path / "methods"
    room.mkdir()
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(room)])
    before = set(sys.modules)

    def write(name: str, source: str) -> None:
        room.joinpath(f"{name}.py").write_text(source)

    yield write
    for name in set(sys.modules) - before:
        if name.startswith("bitwright.methods."):
            del sys.modules[name]


@pytest.fixture
def halving(add: Add) -> None:
    add("halving", SOURCE)


@pytest.mark.usefixtures("halving")
def test_in_python() -> None:
    recipe = Recipe("m", SCHEME, "halving", halvings=3)
    assert (recipe.halvings, Recipe("m", SCHEME).halvings) == (3, None)
    assert recipe.as_dict()["halvings"] == 3
    keys = list(recipe.as_dict())
    assert keys.index("halvings") == keys.index("alignment") + 1, "after those that were there before"
    assert Recipe.from_mapping(recipe.as_dict()) == recipe
    with pytest.raises(RecipeError, match="recipe key 'halvings' is '3'; it takes int or nothing"):
        Recipe("m", SCHEME, halvings="3")
    with pytest.raises(RecipeError, match="a recipe has no key 'halving'; did you mean halvings"):
        Recipe("m", SCHEME, halving=3)


@pytest.mark.usefixtures("halving")
def test_on_the_command_line(run: Run, model: Path, tmp_path: Path) -> None:
    shown = " ".join(run("quantize", "--help").out.split())
    assert "halving: how often ranges are halved. [default: 2, 1 at 4 bits; paper: 0]" in shown
    assert "halving: halve ranges" in shown
    call = ("quantize", model, "--scheme", SCHEME, "--method", "halving")
    for flags, settled in (((), 1), (("--halvings", 3), 3), (("--training", "paper"), 0)):
        assert run(*call, *flags, "--dry-run", "--json").json["settings"] == {"halvings": settled}
    assert "settings halvings 1" in " ".join(run(*call, "--dry-run").out.split())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"halvings": 4}))
    assert run(*call, "--recipe", recipe, "-o", tmp_path / "out").code == 0
    account = json.loads((tmp_path / "out" / "bitwright.json").read_text())
    assert (account["recipe"]["halvings"], account["settings"]) == (4, {"halvings": 4})
    assert account["blocks"][0]["linears"][0]["weight_error"] > 0.1, "it has done what it was told"


@pytest.mark.usefixtures("halving")
def test_refused(run: Run, model: Path) -> None:
    ran = run("quantize", model, "--scheme", SCHEME, "--method", "halving", "--halvings", -1, "--dry-run")
    assert (ran.code, ran.error.strip()) == (2, "halvings is -1; it must be at least 0")
    ran = run("quantize", model, "--scheme", SCHEME, "--method", "rtn", "--halvings", 1, "--dry-run")
    assert ran.error.strip() == "rtn has no use for halvings; leave it out, or take a method that has: halving"


def test_one_key_is_declared_in_one_way(add: Add) -> None:
    add("halving", SOURCE)
    add("quartering", SOURCE)  # the same words are another declaration: its defaults are functions of its own
    with pytest.raises(TypeError, match="setting halvings: quartering and halving declare it differently"):
        known_settings()
