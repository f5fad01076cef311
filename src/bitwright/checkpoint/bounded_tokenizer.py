"""A model's tokenizer, within bounds: transformers loads it in a process of its own (``tokenizer_process``)."""

import json
import signal
import subprocess
import weakref
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self, cast

from bitwright.checkpoint import tokenizer_process
from bitwright.checkpoint.sidecar_files import AGAIN
from bitwright.core.child_process import child_environment, python_command, start
from bitwright.core.errors import CheckpointError, shown

MEMORY = 5 * 2**28
"""The most bytes of address space that the process takes; a tokenizer of 262,000 tokens needs half of it."""
TO_LOAD, TO_ENCODE = 8, 4e-6
"""The seconds of processor time to load a tokenizer and begin, and for each byte of text: tokenizers take a tenth."""
PANIC = "PanicException"
"""The name of what tokenizers raises if its own code gives up; it is no Exception."""


@dataclass(frozen=True)
class Encoded:
    """The numbers of the tokens of a text, or of each of several."""

    input_ids: Any


class BoundedTokenizer:
    """A tokenizer of transformers that can be called on texts, and asked for its attributes, within bounds.

    A context manager; without it, the process ends with the object. Every call raises CheckpointError if the tokenizer
    refuses, or goes beyond a bound.
    """

    def __init__(self, folder: Path) -> None:
        """Load the tokenizer of a model folder."""
        self.folder, self._bytes = folder, 0
        command = python_command(str(Path(tokenizer_process.__file__).resolve()))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = start(command, env=child_environment(), **pipes)
        self.close = weakref.finalize(self, _end, self._process)
        self._ask({"folder": str(folder.resolve()), "memory": MEMORY})

    def __call__(self, text: str | Sequence[str], *, add_special_tokens: bool = True, verbose: bool = False) -> Encoded:
        """Tokenize a text, or several; ``verbose`` is for code that may also be given a tokenizer of transformers."""
        texts = [text] if isinstance(text, str) else [*text]
        self._bytes += sum(len(text.encode()) for text in texts)
        request = {"texts": texts, "special": add_special_tokens, "most": 2 * self._bytes + tokenizer_process.BEYOND}
        counts = self._ask(request)["counts"]
        numbers = array("I", self._read(4 * sum(counts))).tolist()
        if isinstance(text, str):
            return Encoded(numbers)
        following = iter(numbers)
        return Encoded([list(islice(following, count)) for count in counts])

    def ask(self, name: str, *positional: Any, **named: Any) -> Any:
        """The value of an attribute of transformers' tokenizer, or what it returns if it is a method; JSON holds it."""
        return self._ask({"call": name, "with": positional, "and": named})["value"]

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text."""
        return cast("int | None", self.ask("eos_token_id"))

    @property
    def all_special_ids(self) -> list[int]:
        """The tokens that are no text."""
        return cast("list[int]", self.ask("all_special_ids"))

    @property
    def chat_template(self) -> Any:
        """The template of chats; None if there is none."""
        return self.ask("chat_template")

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """The tokens of these numbers, spelled out."""
        return cast("list[str]", self.ask("convert_ids_to_tokens", list(ids)))

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """Render a chat with the model's template."""
        return cast(str, self.ask("apply_chat_template", list(messages), **options))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and return the answer."""
        seconds = int(TO_LOAD + TO_ENCODE * self._bytes) + 1
        assert self._process.stdin is not None, "a pipe was asked for"
        try:
            self._process.stdin.write(json.dumps(request | {"seconds": seconds}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._ended() from None
        answer: dict[str, Any] = json.loads(self._read())
        if "error" in answer:
            raise _unusable(
                self.folder, answer["error"], "be read by transformers" if "folder" in request else "be used"
            )
        return answer

    def _read(self, nbytes: int | None = None) -> bytes:
        """Read so many bytes of an answer, or a line."""
        assert self._process.stdout is not None, "a pipe was asked for"
        raw = self._process.stdout.readline() if nbytes is None else self._process.stdout.read(nbytes)
        if len(raw) < (1 if nbytes is None else nbytes):
            raise self._ended()
        return raw

    def _ended(self) -> CheckpointError:
        """The error for a process that has ended: the system ends it at a limit."""
        code = self._process.wait()
        why = f"ends its process ({code}), perhaps for want of memory: it may take {MEMORY // 2**30} GiB"
        if code == -signal.SIGXCPU:
            why = f"takes more than {TO_LOAD} seconds, and {TO_ENCODE * 1e6:g} for each million bytes of text"
        return CheckpointError(f"the tokenizer in {self.folder} {why}; no sound one does, so {AGAIN}")


def _unusable(folder: Path, why: str, what: str = "be used") -> CheckpointError:
    return CheckpointError(f"the tokenizer in {folder} cannot {what}: {shown(why)[1:-1]}; {AGAIN}")


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.communicate()


@contextmanager
def blaming_the_tokenizer(folder: Path) -> Iterator[None]:
    """A context that turns a panic of the tokenizers library, which is no Exception, into CheckpointError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != PANIC:
            raise
        raise CheckpointError(
            f"the tokenizer in {folder} cannot be used: {shown(str(error))[1:-1]}; {AGAIN}"
        ) from error
