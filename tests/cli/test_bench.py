"""``bitwright bench``."""

from pathlib import Path

from tests.cli.conftest import Run


def test_table_and_json(run: Run, model: Path) -> None:
    asked = ("bench", model, "--against", model, "--tokens", 3, "--prompt", 5, "--threads", 1, "--rounds", 1)
    ran = run(*asked)
    assert ran.code == 0, ran.err
    assert "3 tokens generated at batch 1" in ran.out and "model / original" in ran.out and "1.000" in ran.out
    found = run(*asked, "--json").json
    assert found["weight_ratio"] == 1 and [row["role"] for row in found["rows"]] == ["model", "original"]


def test_refused(run: Run, model: Path) -> None:
    ran = run("bench", model, "--engine", "llama.cpp")
    assert ran.code == 2 and "--format gguf" in ran.error
