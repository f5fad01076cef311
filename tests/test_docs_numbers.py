"""A figure with three or more decimals in a table of the formats' pages stands in a committed file of results."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs/formats").glob("*.md"))
FIGURE = re.compile(r"(?<![\w.])\d+\.\d{3,}(?![\w.])")
"""Not a part of a version (2026.10.11549), of a name, or of a number with an exponent."""


def figures(text: str) -> set[str]:
    """Of the rows of the tables in a page."""
    return {one for line in text.splitlines() if line.startswith("|") for one in FIGURE.findall(line)}


def recorded() -> set[str]:
    """Of all results, as they are shown there."""
    return {one for path in (ROOT / "benchmarks/results").glob("*.md") for one in FIGURE.findall(path.read_text())}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_figure_of_a_table_stands_in_a_result(page: Path) -> None:
    missing = sorted(figures(page.read_text()) - recorded())
    assert not missing, f"{page.name} has {', '.join(missing)}: in no file of benchmarks/results"


def test_figures_are_found_in_tables_and_nowhere_else() -> None:
    rows = "| xllamacpp 2026.10.11549 | 63.6817, -0.001% | 1.234 (2.345) | 3.000e-4 | 4.5 |"
    assert figures(f"The text says 9.876.\n\n{rows}\n") == {"63.6817", "0.001", "1.234", "2.345"}
    assert len(recorded()) > 500
