"""The journal of a run: a line for each finished unit, so that a killed run can go on.

A JSON-lines file in the work folder. The first line is the identity of the run. Each other line is a unit whose file is
durable: {"unit": "block.3", "file": "part-00003.safetensors", "bytes": n, "digests": {...}, "report": {...}}.
``digests`` tells of each file of the unit whether it still has the bytes that it was written with.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bitwright.checkpoint.ranges import file_digest
from bitwright.checkpoint.writer import write_text
from bitwright.core.errors import OutputError, shown
from bitwright.core.small_files import dumped

SHOWN_DIFFERENCES = 8
ABSENT = "(absent)"
OF_THE_MODEL = {
    "model": "has other contents", "written": "was written to", "data": "are others",
    "beside_the_weights": "has other contents",
}  # fmt: skip
"""Parts of an identity that are the model's files, and what became of a file if such a part differs."""
SETTINGS = ("with other settings", "repeat the command with the old settings")
OTHERS = {
    "calibration": ("with other calibration data", "repeat the command with the old text"),
    "versions": ("with other versions of what computes it", "repeat the command with the old versions"),
}
"""Other parts of an identity that are no settings: how the run was begun, and what to do."""
UNIT_KEYS = {"unit": str, "file": str, "bytes": int, "digests": dict, "report": dict}
Listening = Callable[[int, int], None]
"""A function that hears how many bytes of finished units were read again, and of how many."""


def _unheard(done: int, total: int) -> None:
    """Ignore progress."""


class Journal:
    """An append-only record of finished units; every line is on disk before `record` returns.

    `recorded` holds the last line of every unit that was ever finished. `done` holds those whose files still have the
    recorded bytes; they need not be made again. Units whose parts a merge has removed are recorded, but not done, so
    ask `merge_begun` first.
    """

    def __init__(self, path: Path, recorded: dict[str, dict[str, Any]], progress: Listening = _unheard) -> None:
        """Begin with lines that were read; `path` exists and ends with a whole line. Use `Journal.open`."""
        self.path = path
        self.recorded = recorded
        self.done: dict[str, dict[str, Any]] = {}
        read, total = 0, sum(line["bytes"] for line in recorded.values())
        for unit, line in recorded.items():
            if _files_are_whole(path.parent, line):
                self.done[unit] = line
            read += line["bytes"]
            progress(read, total)

    @classmethod
    def open(
        cls, path: Path, identity: Mapping[str, Any], restart: bool = False, progress: Listening = _unheard
    ) -> "Journal":
        """Open the journal at `path`; begin a new one if there is none, or on `restart`.

        `identity` is a nested dict that JSON can hold. Raises OutputError if the journal has another identity, or is
        damaged. An incomplete last line, left by a killed run, is no damage: it is cut off.
        """
        asked = json.loads(json.dumps(identity))  # as JSON gives it back: tuples become lists, keys become text
        try:
            lines = [] if restart or not path.exists() else _whole_lines(path)
        except OSError as error:
            raise OutputError(f"{path}: cannot be read: {error}; check its permissions") from error
        if not lines:
            write_text(path, _line({"identity": asked}))
            return cls(path, {})
        begun = lines[0].get("identity")
        if not isinstance(begun, dict) or not all(_is_unit(line) for line in lines[1:]):
            raise _damaged(path)
        if begun != asked:
            raise OutputError(_other_run(path, begun, asked))
        return cls(path, {line["unit"]: line for line in lines[1:]}, progress)

    def record(
        self, unit: str, file: str | Path, report: Mapping[str, Any], digests: Mapping[str, str] | None = None
    ) -> None:
        """Record that a unit is finished, with its report.

        `file` is durable and lies in the journal's folder. `digests` are those of this file and of others beside it, by
        their names; without them the file is read. Raises OutputError if there is no such file, or if the line cannot
        be written.
        """
        name = Path(file).name
        try:
            size = (self.path.parent / name).stat().st_size
            known = {name: file_digest(self.path.parent / name)} if digests is None else dict(digests)
            line = {"unit": unit, "file": name, "bytes": size, "digests": known, "report": dict(report)}
            text = _line(line)
            _append(self.path, text)
        except OSError as error:
            raise OutputError(
                f"{self.path}: {unit} in {name} could not be recorded: {error}; make room or check the permissions, "
                "then repeat the command: what is recorded is kept"
            ) from error
        self.recorded[unit] = self.done[unit] = json.loads(text)

    def adopt(self, other: Path, *, just_written: bool = False) -> None:
        """Take over the units of another process of this run from its journal, and remove that journal.

        A journal with another identity, or a damaged one, counts as empty: its units are made again. The files of units
        that were ``just_written`` are not read again.
        """
        own, lines = _whole_lines(self.path)[0], list[dict[str, Any]]()
        try:
            lines = _whole_lines(other)
        except OutputError:
            pass
        except OSError as error:
            raise OutputError(f"{other}: cannot be read: {error}; check its permissions") from error
        if lines and lines[0] == own and all(_is_unit(line) for line in lines[1:]):
            for line in lines[1:]:
                _append(self.path, _line(line))
                self.recorded[line["unit"]] = line
                if _files_are_whole(self.path.parent, line, read=not just_written):
                    self.done[line["unit"]] = line
        other.unlink(missing_ok=True)


def _line(value: Mapping[str, Any]) -> str:
    """One line of the journal."""
    return dumped(value) + "\n"


def _append(path: Path, text: str) -> None:
    """Append text durably and whole; if the disk is full, what was written in part is cut off."""
    before = path.stat().st_size
    try:
        with path.open("ab") as journal:
            journal.write(text.encode("utf-8"))
            journal.flush()
            os.fsync(journal.fileno())
    except BaseException:
        with suppress(OSError):
            os.truncate(path, before)
        raise


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines; an incomplete last line is cut from the file, so that the next one begins a new line."""
    raw = path.read_bytes()
    pieces = raw.splitlines(keepends=True)
    lines: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces, start=1):
        line = _parsed(piece)
        if line is not None:
            lines.append(line)
        elif number < len(pieces):
            raise _damaged(path)
        else:
            os.truncate(path, len(raw) - len(piece))
    return lines


def _parsed(piece: bytes) -> dict[str, Any] | None:
    """The object on a line, or None if the line was not written to its end."""
    try:
        line = json.loads(piece.decode("utf-8")) if piece.endswith(b"\n") else None
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


def _is_unit(line: Mapping[str, Any]) -> bool:
    """Whether a line has the form that `record` writes: its files lie beside the journal."""
    if not all(isinstance(line.get(key), kind) for key, kind in UNIT_KEYS.items()):
        return False
    return all(name and Path(name).name == name for name in (line["file"], *line["digests"]))


def _damaged(path: Path) -> OutputError:
    """The error for a journal with lines that no run writes."""
    return OutputError(f"{path}: not the journal of a run; begin anew with --restart")


def _files_are_whole(folder: Path, line: Mapping[str, Any], read: bool = True) -> bool:
    """Whether a unit's file has the size it was recorded with and, if they are ``read``, all its files their bytes."""
    path = folder / str(line["file"])
    if not path.is_file() or path.stat().st_size != int(line["bytes"]):
        return False
    try:
        return not read or all(file_digest(folder / name) == digest for name, digest in line["digests"].items())
    except OSError:
        return False


def _other_run(path: Path, begun: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """The message that says how two identities differ, in at most eight lines, and what to do."""
    old, new = dict(_dotted(begun)), dict(_dotted(asked))
    keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key, ABSENT) != new.get(key, ABSENT)]
    lines = [f"  {_change(old, new, key)}" for key in keys[:SHOWN_DIFFERENCES]]
    if len(keys) > SHOWN_DIFFERENCES:
        lines.append(f"  and {len(keys) - SHOWN_DIFFERENCES} more")
    ways = dict.fromkeys(_way(key) for key in keys)
    if SETTINGS in ways:  # which say of calibration data and versions too
        ways = {way: None for way in ways if way not in OTHERS.values()}
    how, mend = (" and ".join(words) for words in zip(*ways, strict=True))
    return "\n".join(
        [f"{path}: this result was begun {how}:", *lines, f"{mend} to go on, or with --restart to begin anew"]
    )


def _way(key: str) -> tuple[str, str]:
    """How a run was begun if a key of its identity differs, and what to do to go on with it."""
    room = key.partition(".")[0]
    if room in OF_THE_MODEL:
        return "from other files of the model than are there now", "put these back as they were and repeat the command"
    return OTHERS.get(room, SETTINGS)


def _change(old: Mapping[str, Any], new: Mapping[str, Any], key: str) -> str:
    """The change of a key, in words if it is a file, with both values."""
    values = f"{key}: {' -> '.join(_beside(old, new, key))}"
    room, _, file = key.partition(".")
    if room not in OF_THE_MODEL:
        return values
    what = "is gone" if key not in new else "was not there" if key not in old else OF_THE_MODEL[room]
    return f"{file or 'the weights'} {what} ({values})"


def _beside(old: Mapping[str, Any], new: Mapping[str, Any], key: str) -> tuple[str, str]:
    """Two values for a message; long texts are shown from their first difference."""
    was, now = (shown(values[key]) if key in values else ABSENT for values in (old, new))
    if was != now:
        return was, now
    before, after = str(old[key]), str(new[key])
    shorter = min(len(before), len(after))
    at = next((at for at in range(shorter) if before[at] != after[at]), shorter)
    return shown(f"...{before[at:]}"), shown(f"...{after[at:]}")


def _dotted(identity: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a nested dict: (keys joined with dots, value)."""
    for key, value in identity.items():
        if isinstance(value, dict) and value:
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
