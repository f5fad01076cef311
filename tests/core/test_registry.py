from pathlib import Path

import pytest

import bitwright
from bitwright.core.errors import RecipeError, nearest
from bitwright.core.registry import find, names


@pytest.mark.parametrize("room", ["methods", "formats", "families"])
def test_every_file_of_a_room_is_registered_under_its_name(room: str) -> None:
    folder = Path(bitwright.__file__).parent / room
    modules = [*folder.glob("*.py"), *(init.parent for init in folder.glob("*/__init__.py"))]
    expected = sorted(m.stem.replace("_", "-") for m in modules if m.stem != "__init__")
    assert expected
    assert list(names(room)) == expected
    for name in names(room):
        assert find(room, name).__name__ == f"bitwright.{room}.{name.replace('-', '_')}"


@pytest.mark.parametrize(
    ("room", "asked", "says"),
    [
        ("methods", "rtm", "there is no method 'rtm'; did you mean rtn? Known: "),
        ("formats", "compressed_tensors", "there is no format 'compressed_tensors'; did you mean compressed-tensors?"),
        ("methods", "__init__", "there is no method '__init__'"),
        ("methods", "../cli", "there is no method '../cli'"),
        ("methods", "", "there is no method ''"),
    ],
)
def test_what_is_not_registered_is_refused_with_the_nearest(room: str, asked: str, says: str) -> None:
    with pytest.raises(RecipeError) as error:
        find(room, asked)
    assert says in str(error.value)


def test_nearest_says_nothing_where_nothing_is_near() -> None:
    assert nearest("zzz", ["rtn", "gptq"]) == "Known: gptq, rtn"
