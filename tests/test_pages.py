"""Every method, format and engine has its page, its row in README.md and its name in the help.

A page of docs/methods or docs/formats is about what its file is named after. A page about several names them all in a
line that begins with "Methods: " or "Formats: ".
"""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bitwright import api
from bitwright.cli.commands import app
from bitwright.core.registry import names
from bitwright.methods import PRESETS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
METHODS, FORMATS = names("methods"), names("formats")
ENGINES = {engine.name: engine for engine in api.engines()}
CODE = re.compile(r"`([^`]+)`")


def about(page: Path, heading: str) -> list[str]:
    """What a page is about: its file's name, or what stands in backticks in the line that names more."""
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith(f"{heading}: ")]
    return CODE.findall(lines[0]) if lines else [page.stem]


def first_cells(page: Path) -> list[str]:
    """The first cell of every row of every table in a page."""
    return [
        line.split("|")[1].strip() for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| ")
    ]


def help_of(command: str) -> str:
    """What ``--help`` prints, on one line, words that were cut at a hyphen joined again."""
    ran = CliRunner().invoke(app, [command, "--help"])
    assert ran.exit_code == 0, ran.output
    return re.sub(r"-\s+", "-", " ".join(ran.output.split()))


def named(name: str, text: str) -> bool:
    """Whether a text has this name as a word of its own."""
    return re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", text) is not None


@pytest.mark.parametrize(
    ("room", "heading", "known", "also"),
    [("methods", "Methods", METHODS, tuple(PRESETS)), ("formats", "Formats", FORMATS, ())],
)
def test_each_has_one_page(room: str, heading: str, known: tuple[str, ...], also: tuple[str, ...]) -> None:
    found = [name for page in (DOCS / room).glob("*.md") for name in about(page, heading)]
    assert sorted(found) == sorted((*known, *also))


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_are_in_every_table_of_their_page(engine: str) -> None:
    """What each runs, what that was checked with, and what else is said of each of them."""
    cells = first_cells(DOCS / "engines.md")
    assert cells.count("engine") >= 2
    assert len([cell for cell in cells if engine in cell.lower()]) == cells.count("engine")


@pytest.mark.parametrize("name", [*METHODS, *PRESETS, *FORMATS, *ENGINES])
def test_each_has_its_row_in_the_readme(name: str) -> None:
    rows = [part for cell in first_cells(ROOT / "README.md") for code in CODE.findall(cell) for part in code.split("+")]
    assert name in rows


@pytest.mark.parametrize("name", ENGINES)
def test_the_readme_says_what_an_engine_loads(name: str) -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    (row,) = (line for line in lines if line.startswith(f"| `{name}` |"))
    assert CODE.findall(row.split("|")[2]) == list(dict.fromkeys(way.format for way in ENGINES[name].ways))


@pytest.mark.parametrize("name", [*METHODS, *PRESETS, *FORMATS, *ENGINES])
def test_the_help_of_quantize_names_each(name: str) -> None:
    assert named(name, help_of("quantize"))


@pytest.mark.parametrize("name", FORMATS)
def test_the_help_of_export_names_each_format(name: str) -> None:
    assert named(name, help_of("export"))


def test_the_navigation_lists_every_page_once() -> None:
    _, _, listed = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")
    pages = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")]
    assert sorted(re.findall(r"[\w/.-]+\.md\b", listed)) == sorted(pages)


def test_a_name_is_a_word_of_its_own() -> None:
    text = "lwc, let+lwc; compressed-tensors, llama.cpp."
    assert all(named(name, text) for name in ("lwc", "let", "compressed-tensors", "llama.cpp"))
    assert not any(named(name, text) for name in ("lw", "tensors", "compressed", "cpp", "mlc"))
