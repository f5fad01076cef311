import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitwright.checkpoint.journal import Journal
from bitwright.checkpoint.ranges import file_digest
from bitwright.core.errors import OutputError

IDENTITY: dict[str, Any] = {"recipe": {"scheme": "W4A16", "shape": (1, 2)}, "versions": {"torch": "2.13"}, "seed": 0}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal with two finished units."""
    journal = Journal.open(tmp_path / "journal.jsonl", IDENTITY)
    for number in range(2):
        (tmp_path / f"part-{number}").write_bytes(bytes(number + 1))
        journal.record(f"block.{number}", f"part-{number}", {"error": 0.5})
    return tmp_path / "journal.jsonl"


def test_what_was_recorded_is_found_again(path: Path) -> None:
    journal = Journal.open(path, IDENTITY)
    assert list(journal.done) == ["block.0", "block.1"]
    assert journal.done["block.1"] == {
        "unit": "block.1",
        "file": "part-1",
        "bytes": 2,
        "digests": {"part-1": file_digest(path.parent / "part-1")},
        "report": {"error": 0.5},
    }
    assert journal.done == journal.recorded
    assert len(path.read_text().splitlines()) == 3


def test_a_file_may_be_given_as_a_path(path: Path) -> None:
    journal = Journal.open(path, IDENTITY)
    journal.record("again", path.parent / "part-0", {})
    assert journal.done["again"]["file"] == "part-0"


def test_only_the_unit_whose_file_is_gone_is_done_again(path: Path) -> None:
    (path.parent / "part-0").unlink()
    journal = Journal.open(path, IDENTITY)
    assert list(journal.done) == ["block.1"]
    assert list(journal.recorded) == ["block.0", "block.1"]
    (path.parent / "part-1").write_bytes(b"longer")
    assert not Journal.open(path, IDENTITY).done
    (path.parent / "part-0").write_bytes(b"new")
    journal.record("block.0", "part-0", {"error": 1})
    assert Journal.open(path, IDENTITY).done["block.0"]["report"] == {"error": 1}


@pytest.mark.parametrize("torn", [b'{"unit": "bl', b"{}", b'{"unit": "\xc3', b"\0" * 50, b"\0\0\n", b"[1]\n"])
def test_a_torn_last_line_is_cut_off(path: Path, torn: bytes) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    journal = Journal.open(path, IDENTITY)
    assert path.read_bytes() == whole
    (path.parent / "part-2").touch()
    journal.record("block.2", "part-2", {})
    assert list(Journal.open(path, IDENTITY).done) == ["block.0", "block.1", "block.2"]


def test_every_cut_of_a_journal_is_a_journal(path: Path) -> None:
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        journal = Journal.open(path, IDENTITY)
        assert list(journal.done) == ["block.0", "block.1"][: max(whole[:length].count(b"\n") - 1, 0)]
        assert path.read_bytes().endswith(b"\n")


@pytest.mark.parametrize(
    "text", ['{"unit": "x"}\n{"a": 1}\n', "x\n{}\n", '{"identity": {}}\n{"unit": "x"}\n', '{"identity": 3}\n']
)
def test_what_no_run_writes_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "j").write_text(text)
    with pytest.raises(OutputError, match=r"not the journal of a run; begin anew with --restart"):
        Journal.open(tmp_path / "j", {})
    assert (tmp_path / "j").read_text() == text
    assert not Journal.open(tmp_path / "j", {}, restart=True).done


def test_another_identity_is_refused_key_by_key(path: Path) -> None:
    other = {"recipe": {"scheme": "W3A16", "shape": (1, 2)}, "versions": {"torch": "2.13", "python": "3.11"}}
    with pytest.raises(OutputError) as caught:
        Journal.open(path, other)
    assert str(caught.value).splitlines()[1:] == [
        "  recipe.scheme: 'W4A16' -> 'W3A16'",
        "  seed: 0 -> (absent)",
        "  versions.python: (absent) -> '3.11'",
        "repeat the command with the old settings to go on, or with --restart to begin anew",
    ]
    assert len(Journal.open(path, IDENTITY).done) == 2


def test_long_values_are_shown_from_where_they_differ(tmp_path: Path) -> None:
    path, alike = tmp_path / "journal.jsonl", "a" * 1000
    Journal.open(path, {"key": f"{alike}old"})
    with pytest.raises(OutputError, match=r"key: '\.\.\.old' -> '\.\.\.new'"):
        Journal.open(path, {"key": f"{alike}new"})


def test_at_most_eight_differences_are_listed(path: Path) -> None:
    with pytest.raises(OutputError) as caught:
        Journal.open(path, IDENTITY | {f"key{number:02d}": "x" * 500 for number in range(20)})
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + 8 + 1 + 1
    assert lines[-2] == "  and 12 more"
    assert max(map(len, lines[1:])) < 150


def test_an_empty_section_differs_from_none(path: Path) -> None:
    with pytest.raises(OutputError, match=r"extra: \(absent\) -> \{\}"):
        Journal.open(path, IDENTITY | {"extra": {}})


def test_restart_begins_anew(path: Path) -> None:
    journal = Journal.open(path, {"seed": 1}, restart=True)
    assert not journal.done
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"identity": {"seed": 1}}]


def test_a_unit_without_its_file_is_not_recorded(path: Path) -> None:
    journal = Journal.open(path, IDENTITY)
    with pytest.raises(OutputError, match=r"block\.9 in absent could not be recorded"):
        journal.record("block.9", "absent", {})
    assert "block.9" not in journal.recorded


def test_a_line_that_a_full_disk_takes_in_part_is_cut_off(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, whole = Journal.open(path, IDENTITY), path.read_bytes()

    def full(_: int) -> None:
        os.truncate(path, len(whole) + 10)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match=r"could not be recorded: .*No space left"):
            journal.record("block.2", "part-1", {})
    assert path.read_bytes() == whole
    journal.record("block.2", "part-1", {})
    assert len(Journal.open(path, IDENTITY).done) == 3


def test_killed_at_every_step_a_record_is_there_or_not(
    path: Path, killed_at: Callable[[int, Callable[[], object]], bool]
) -> None:
    whole, step = path.read_bytes(), 0
    while killed_at(step, lambda: Journal.open(path, IDENTITY).record("block.2", "part-1", {"n": 1})):
        assert list(Journal.open(path, IDENTITY).done) in (["block.0", "block.1"], ["block.0", "block.1", "block.2"])
        path.write_bytes(whole)
        step += 1
    assert step >= 1


def test_a_journal_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "j").mkdir()
    with pytest.raises(OutputError, match="cannot be read"):
        Journal.open(tmp_path / "j", {})


@pytest.mark.parametrize(("changes", "says"), [
    ({"data": "2"}, ["  the weights are others (data: '1' -> '2')"]),
    ({"beside_the_weights": {}}, ["  tokenizer.json is gone (beside_the_weights.tokenizer.json: 'x' -> (absent))",
                                  "  the weights has"]),
    ({"written": {"model.safetensors": "later"}}, ["  model.safetensors was written to (written.model"]),
])  # fmt: skip
def test_other_files_of_the_model_are_no_settings(changes: dict[str, object], says: list[str], tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    files = {"data": "1", "beside_the_weights": {"tokenizer.json": "x"}, "written": {"model.safetensors": "then"}}
    Journal.open(path, IDENTITY | files)
    with pytest.raises(OutputError) as caught:
        Journal.open(path, IDENTITY | files | changes)
    message = str(caught.value)
    assert "begun from other files of the model than are there now:" in message and "settings" not in message
    assert says[0] in message


def test_other_versions_are_no_settings(path: Path) -> None:
    with pytest.raises(OutputError, match="begun with other versions of what computes it:") as caught:
        Journal.open(path, IDENTITY | {"versions": {"torch": "0.1"}})
    assert "settings" not in str(caught.value)


@pytest.mark.parametrize("outside", ["/dev/zero", "../x", ".", ""])
def test_files_outside_of_its_folder_are_not_read(path: Path, outside: str) -> None:
    line = {"unit": "a", "file": "part-1", "bytes": 1, "digests": {outside: "0"}, "report": {}}
    with path.open("a", encoding="utf-8") as journal:
        journal.write(json.dumps(line) + "\n")
    with pytest.raises(OutputError, match="not the journal of a run"):
        Journal.open(path, IDENTITY)
