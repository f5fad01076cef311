"""docs/reference/json.md names every key that ``--json`` prints."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from bitwright.api.benching import Bench
from bitwright.api.demonstrating import Demonstration, DemoRow
from bitwright.api.evaluating import Evaluation
from bitwright.api.exporting import Exported
from bitwright.api.inspecting import Inspection, LinearSize
from bitwright.api.quantizing import Result
from bitwright.core.account import BlockReport, LinearReport
from bitwright.core.engine import Engine, Way
from bitwright.evaluation.measure import Measurement
from bitwright.evaluation.speed import Speed
from bitwright.prepare.plan import Plan, TensorKind
from bitwright.stream.memory import Budget
from bitwright.verification.findings import Check, Verification

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "json.md"


def keys_of(section: str) -> set[str]:
    """What stands in backticks under a heading."""
    _, found = PAGE.read_text(encoding="utf-8").split(f"\n## {section}\n", 1)
    return set(re.findall(r"`(\w+)`", found.split("\n## ", 1)[0]))


@pytest.mark.parametrize(("section", "results"), [
    ("`quantize`", [Result]), ("`quantize --dry-run`", [Plan, Budget, TensorKind]), ("`export`", [Exported]),
    ("`verify`", [Verification, Check]), ("`engines`", [Engine, Way]), ("`bench`", [Bench, Speed]),
    ("`evaluate`", [Evaluation, Measurement]), ("`inspect`", [Inspection, LinearSize]),
    ("`demo`", [Demonstration, DemoRow]), ("`bitwright.json`, in every written folder", [BlockReport, LinearReport]),
])  # fmt: skip
def test_every_key_is_on_the_page(section: str, results: list[Any]) -> None:
    printed = {field.name for result in results for field in fields(result)}
    assert printed <= keys_of(section), sorted(printed - keys_of(section))
