"""What models have answered, kept as it comes: a run of tasks that is killed goes on where it stopped.

A JSON-lines file: after a first line that says what it is, each line is one answer under a digest of what was asked and
of who answered, so answers of several models go into one file. Lines are flushed one by one: a killed process loses
none, a power cut may lose the last.
"""

import json
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any

from bitwright.core.errors import OutputError

FIRST = {"bitwright": "answers"}


class Answers:
    """The answers of one model, in memory and on disk; a context manager that closes the file."""

    def __init__(self, path: Path, answerer: Mapping[str, Any]) -> None:
        """Reads what is there and goes on at its end; ``answerer`` is all that answers depend on, JSON-able.

        Raises OutputError for a file that is none of answers, or that cannot be written to.
        """
        self.path, self._answerer = path, json.dumps(answerer, sort_keys=True)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = _whole_lines(path)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise OutputError(
                f"{path}: answers cannot be kept there: {error}; name another file with --answers"
            ) from None
        if not lines:
            self._write(FIRST)
        self._known = {line["key"]: line["answer"] for line in lines[1:] if "key" in line and "answer" in line}

    def __enter__(self) -> "Answers":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def key(self, kind: str, asked: tuple[Any, ...]) -> str:
        """The digest under which an answer is kept: of the model, the kind of request and everything in it."""
        what = json.dumps([self._answerer, kind, *asked], sort_keys=True, default=str)
        return sha256(what.encode()).hexdigest()

    def __contains__(self, key: object) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Any:
        return self._known[key]

    def keep(self, key: str, answer: Any) -> None:
        """Writes one answer down; OSError where the disk is full."""
        self._known[key] = answer
        self._write({"key": key, "answer": answer})

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of the file; what is torn at its end is cut off, so that the next begins on its own."""
    raw = path.read_bytes() if path.exists() else b""
    whole = raw[: raw.rfind(b"\n") + 1]
    try:
        lines = [json.loads(line) for line in whole.decode("utf-8").splitlines()]
    except ValueError:
        lines = [None]
    begun = lines[:1] == [FIRST] or (not lines and json.dumps(FIRST).encode().startswith(raw))
    if not begun or not all(isinstance(line, dict) for line in lines):
        raise OutputError(f"{path} is no file of answers; name another one with --answers, or remove it")
    if len(whole) < len(raw):
        os.truncate(path, len(whole))
    return lines
