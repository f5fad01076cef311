"""A short version of ``make faults``: what once failed, a few changed files of every kind, and a few killed runs."""

import json
from pathlib import Path

import pytest

from fault_files import Kind, kinds
from fault_kills import kill_runs
from faults import FAILED, READ, SLOW, count, outcome

CORPUS = Path(__file__).parent / "corpus"
SECONDS = 60.0
EXAMPLES = 4


@pytest.fixture(scope="session")
def valid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    """The kinds of files by their names."""
    return {kind.name: kind for kind in kinds(tmp_path_factory.mktemp("faults"))}


def test_what_once_failed_is_read_or_refused(valid: dict[str, Kind]) -> None:
    for path in sorted(CORPUS.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            case = json.loads(line)
            word, reason = outcome(valid[case["kind"]], case["changes"], SECONDS)
            assert word not in (FAILED, SLOW), f"{line[:300]}: {word}, {reason}"


def test_changed_files_are_read_or_refused(valid: dict[str, Kind]) -> None:
    for kind in valid.values():
        assert outcome(kind, [], SECONDS) == (READ, "")
        assert not count(kind, EXAMPLES, 0, SECONDS).failures


def test_killed_runs_give_the_bytes_of_an_undisturbed_run(valid: dict[str, Kind]) -> None:
    work = next(iter(valid.values())).source.parent
    kills = kill_runs(work, 4, 0)
    assert not kills.failures
    assert kills.counts["same"] == kills.counts["killed"] == 4
