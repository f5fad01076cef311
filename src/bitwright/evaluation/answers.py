"""Answers of models to tasks: each is kept as soon as it is there, so that a killed run goes on where it stopped.

They are in a JSON-lines file. Its first line says what the file is; each other line is one answer, under a digest of
the question and of the model, so that one file can hold the answers of several models. Lines are flushed one by one: a
killed process loses none, a power cut may lose the last.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from bitwright.core.errors import OutputError
from bitwright.core.progress import Listener, Progress
from bitwright.core.small_files import require_regular

FIRST = {"bitwright": "answers"}


class Answers:
    """The answers of one model, in memory and on disk; a context manager that closes the file."""

    def __init__(self, path: Path, answerer: Mapping[str, Any]) -> None:
        """Read the answers in a file, and go on at its end.

        ``answerer`` is everything that answers depend on besides the question, as JSON takes it. Raises OutputError for
        a file that does not hold answers, or that cannot be written to.
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
        """The digest under which an answer is kept: of the model, the kind of the request and its contents."""
        question = json.dumps([self._answerer, kind, *asked], sort_keys=True, default=str)
        return sha256(question.encode()).hexdigest()

    def __contains__(self, key: object) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Any:
        return self._known[key]

    def keep(self, key: str, answer: Any) -> None:
        """Write one answer to the file. Raises OSError if the disk is full."""
        self._known[key] = answer
        self._write({"key": key, "answer": answer})

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of the file; an incomplete last line is cut off."""
    if path.exists():
        require_regular(path, OutputError)
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


class Answerer(Protocol):
    """The part of lm-eval's model class that is used here."""

    max_length: int
    tok_encode: Callable[[str], list[int]]
    set_cache_hook: Callable[[Any], None]


class Answering:
    """A replacement for lm-eval's model that keeps answers; it has the methods and attributes that lm-eval needs.

    ``stage`` names the task in the progress. ``cut`` counts the prompts of each task that are longer than the model's
    context.
    """

    rank, world_size = 0, 1

    def __init__(self, lm: Answerer, answers: Answers, stage: str, listener: Listener) -> None:
        """Ask ``lm`` for the answers that ``answers`` does not hold."""
        self._lm, self._answers, self._stage, self._listener = lm, answers, stage, listener
        self.cut: Counter[str] = Counter()

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation in nats, and whether the model would write it greedily."""
        longest = self._lm.max_length + 1  # the last token is predicted and not read
        for request in requests:
            self.cut[request.task_name] += len(self._lm.tok_encode("".join(request.args))) > longest
        return [(float(value), bool(greedy)) for value, greedy in self._answer("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """The log-likelihood of each whole text in nats, window by window."""
        return self._answer("loglikelihood_rolling", requests)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The text that the model writes after each prompt."""
        for request in requests:
            room = self._lm.max_length - new_tokens(request.args[1])
            self.cut[request.task_name] += len(self._lm.tok_encode(request.args[0])) > room
        if any(request.args[1].get("do_sample") for request in requests):  # sampled: another run would differ
            return self._ask("generate_until", requests, keep=False)
        return self._answer("generate_until", requests)

    def _answer(self, kind: str, requests: Sequence[Any]) -> list[Any]:
        keys = [self._answers.key(kind, request.args) for request in requests]
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in self._answers}
        self._ask(kind, list(missing.values()), keep=True)
        return [self._answers[key] for key in keys]

    def _ask(self, kind: str, requests: list[Any] | Sequence[Any], keep: bool) -> list[Any]:
        if not requests:
            return []
        self._lm.set_cache_hook(_Hook(self._answers if keep else None, self._stage, len(requests), self._listener))
        answers: list[Any] = getattr(self._lm, kind)(requests, disable_tqdm=True)
        return answers


class _Hook:
    """A hook that lm-eval calls with each answer at once."""

    def __init__(self, answers: Answers | None, stage: str, total: int, listener: Listener) -> None:
        self._answers, self._stage, self._total, self._listener = answers, stage, total, listener
        self._done = 0
        listener(Progress(stage, 0, total, "answers"))

    def add_partial(self, kind: str, question: tuple[Any, ...], answer: Any) -> None:
        if self._answers is not None:
            self._answers.keep(self._answers.key(kind, question), answer)
        self._done += 1
        self._listener(Progress(self._stage, self._done, self._total, "answers"))


def new_tokens(settings: dict[str, Any], default: int = 256) -> int:
    """The largest number of generated tokens, under any name that lm-eval accepts; 256 if none is given."""
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    return next((int(settings[name]) for name in names if settings.get(name) is not None), default)
