"""Several sources in one option: what is a name, what is a share, and how segments are divided."""

from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitwright.calibration.sources import Source, shares_of, sources_of
from bitwright.core.errors import CalibrationError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parsed(text: str) -> list[tuple[str, float]]:
    return [(source.name, float(source.share)) for source in sources_of(text)]


@pytest.mark.parametrize(
    ("text", "sources"),
    [
        ("builtin", [("builtin", 1)]),
        ("a.jsonl:2,b.txt:1", [("a.jsonl", 2), ("b.txt", 1)]),
        ("a.jsonl:0.5, b.txt", [("a.jsonl", 0.5), ("b.txt", 1)]),
        ("mix:3,builtin", [("mix", 3), ("builtin", 1)]),
        ("mix:3", [("mix", 3)]),
        ("org/data", [("org/data", 1)]),
        ("org/data:2", [("org/data:2", 1)]),
        ("org/data:raw:train", [("org/data:raw:train", 1)]),
        ("org/data:raw:train:2,b.txt:1", [("org/data:raw:train", 2), ("b.txt", 1)]),
    ],
)
def test_names_and_shares(text: str, sources: list[tuple[str, float]], folder: Path) -> None:
    assert parsed(text) == sources


@pytest.mark.parametrize("name", ["a:2", "a,b", "a.txt:1,b.txt:2", "x,y:3"])
def test_a_path_that_exists_is_one_name(name: str, folder: Path) -> None:
    (folder / name).write_text("x")
    assert parsed(name) == [(name, 1)]
    assert parsed(f"{name},other.txt") == [(name, 1), ("other.txt", 1)]
    assert parsed(f"other.txt:4,{name}:2") == [("other.txt", 4), (name, 2)]


def test_a_file_with_a_share_alone(folder: Path) -> None:
    (folder / "a.txt").write_text("x")
    assert parsed("a.txt:5") == [("a.txt", 5)]


def test_the_home_folder_in_each(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert parsed("~/a.txt:2,~/b.txt") == [(f"{folder}/a.txt", 2), (f"{folder}/b.txt", 1)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a.txt,,b.txt", "names nothing between two commas; write it like a.jsonl:2,b.txt:1"),
        ("a.txt,", "names nothing between two commas"),
        ("a.txt:0,b.txt", "'a.txt:0' has a share of 0; leave 'a.txt' out"),
        ("a.txt,b.txt,a.txt:2", "names 'a.txt' twice; name it once, with a share: a.txt:2"),
    ],
)
def test_refusals(text: str, says: str, folder: Path) -> None:
    with pytest.raises(CalibrationError) as error:
        sources_of(text)
    assert says in str(error.value)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(50, 300))
def test_shares_are_divided_to_the_nearest_segment(shares: list[int], samples: int) -> None:
    sources = tuple(Source(str(n), Fraction(share)) for n, share in enumerate(shares))
    counts = shares_of(samples, sources)
    assert sum(counts) == samples
    for count, share in zip(counts, shares, strict=True):
        assert abs(count - samples * share / sum(shares)) < 1
