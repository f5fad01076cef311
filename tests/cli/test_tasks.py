"""``evaluate --tasks``: what it prints, and what it refuses with one message."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.conftest import Run
from tests.task_files import CHOICES, CODE, TASKS, WORDS, problems, questions, write_task

from bitwright.demo import MODEL_DIR

KEYS = {
    "task": str,
    "metric": str,
    "filter": str,
    "value": float,
    "standard_error": float,
    "documents": int,
    "shots": int,
    "version": str,
    "cut": int,
    "group": type(None),
    "reference": float,
    "reference_standard_error": float,
    "difference": float,
}


@pytest.fixture(autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    place = tmp_path_factory.mktemp("caches")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(place / "datasets"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(place))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    write_task(folder, "small_choice", CHOICES, questions(6))
    write_task(folder, "small_words", WORDS, [each | {"written": "nothing"} for each in questions(2)])
    write_task(folder, "small_code", CODE, problems())
    return folder


def test_json(run: Run, files: Path) -> None:
    asked = ["--tasks", ", ".join(TASKS), "--task-files", files, "--allow-code-execution", "--reference", MODEL_DIR]
    ran = run("evaluate", MODEL_DIR, *asked, "--limit", 2, "--json")
    assert ran.code == 0, ran.err
    assert (ran.json["text"], ran.json["measurement"]) == (None, None)
    rows = ran.json["tasks"]
    assert [row["task"] for row in rows] == ["small_choice", "small_choice", "small_words", "small_code"]
    for row in rows:
        assert {key: type(value) for key, value in row.items()} == KEYS
        assert (row["documents"], row["difference"], row["version"]) == (2, 0, "1.5")
        assert row["value"] == row["reference"]
    assert rows[-1]["metric"] == "pass@1" and rows[-1]["value"] == 0.5


def test_the_screen(run: Run, files: Path) -> None:
    group = files / "group.yaml"
    group.write_text(
        "group: small\ntask: [small_choice, small_words]\naggregate_metric_list:\n"
        "  - {metric: acc, aggregation: mean, weight_by_size: true}\n"
    )
    ran = run("evaluate", MODEL_DIR, "--tasks", "small", "--task-files", files, "--text", "builtin", "--windows", 1)
    assert ran.code == 0, ran.err
    assert "perplexity" in ran.out
    (row,) = (line for line in ran.out.splitlines() if "small" in line)
    assert "acc" in row and "±" in row and " 6 " in row, "documents of those tasks of the group that have it"
    assert "3 scores of parts of these: --json" in ran.out


def test_refusals(refused: Callable[..., str], files: Path) -> None:
    asked = ("evaluate", MODEL_DIR, "--task-files", files)
    assert "--allow-code-execution" in refused(*asked, "--tasks", "small_code")
    assert "which tasks?" in refused(*asked)
    assert "which tasks?" in refused(*asked, "--tasks", ",")
    assert "--limit 0" in refused(*asked, "--tasks", "small_choice", "--limit", 0)
