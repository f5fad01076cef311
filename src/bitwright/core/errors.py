"""Errors that a user can cause: one message each, no traceback, exit code 2.

Every message says what was asked, what was found, where, and what to try.
"""

import re
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

SHOWN_CHARACTERS = 100
MOST_CHARACTERS, LONGEST_WORD = 4000, 500
"""The most characters of a message, and of a word in it: a stranger's file may put megabytes into either."""
NO_THREAD = "can't start new thread"
"""Python's message if the system gives no thread."""


_LONG_WORD = re.compile(rf"\S{{{LONGEST_WORD + 1},}}")


class UserError(Exception):
    """Something that the user can mend. Its message is all that the command line prints; if it is long, it is cut."""

    def __init__(self, *arguments: object) -> None:
        """Take the message, as one text."""
        super().__init__(*(cut(part) if isinstance(part, str) else part for part in arguments))


class SchemeError(UserError):
    """A scheme's text that cannot be read, or a scheme that does not fit a linear."""


class RecipeError(UserError):
    """A recipe key or value that is not known, or that does not go with the others."""


class CheckpointError(UserError):
    """A model folder, or a file in it, that cannot be read as what it claims to be."""


class ChangedError(CheckpointError):
    """A checkpoint that was written to while it was read: what was made so far may be of two models."""


class OutputError(UserError):
    """A place that cannot be written to: it exists, it is full, or another run holds it."""


class ReportedError(UserError):
    """An error that another process of the same run reports for all of them; this process ends silently."""


class CalibrationError(UserError):
    """Calibration or evaluation data that is missing, unreadable or too short."""


class MachineError(UserError):
    """Processes, threads or open files of which the machine gives no more."""

    @classmethod
    def of(cls, error: BaseException) -> "MachineError":
        """The error for what the system refused."""
        return cls(
            f"the machine starts no more processes or threads: {error}. Take fewer --workers, end other programs, or "
            "raise the limit (ulimit -u, ulimit -n, or the container's)"
        )


@contextmanager
def blaming_the_machine() -> Iterator[None]:
    """A context that turns the error of a thread that cannot be started into MachineError."""
    try:
        yield
    except RuntimeError as error:
        if NO_THREAD in str(error):
            raise MachineError.of(error) from error
        raise


def cut(message: str) -> str:
    """A message with long words, and then the whole, cut in the middle: what to do stands at the end.

    >>> len(cut("x" * 10**6)), len(cut("x " * 10**6))
    (305, 4000)
    """
    if len(message) > LONGEST_WORD:
        message = _LONG_WORD.sub(lambda word: f"{word[0][:200]} ... {word[0][-100:]}", message)
    if len(message) > MOST_CHARACTERS:
        message = f"{message[: MOST_CHARACTERS - 1005]} ... {message[-1000:]}"
    return message


def nearest(asked: str, known: Iterable[str]) -> str:
    """The end of an error message: the nearest known value, then all of them.

    >>> nearest("rtm", ["rtn", "gptq"])
    'did you mean rtn? Known: gptq, rtn'
    """
    names = sorted(known)
    close = get_close_matches(asked.lower(), names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}Known: {', '.join(names)}"


def in_shell(path: object) -> str:
    """A path or pattern as a command that is proposed has it: in quotes if a shell would read it otherwise.

    >>> in_shell("my model")
    "'my model'"
    """
    return shlex.quote(str(path))


def shown(value: object) -> str:
    """A stranger's value as an error message may print it: quoted, control characters escaped, cut to a line."""
    try:
        quoted = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits has no decimal text
        quoted = f"a huge {type(value).__name__}"
    return quoted if len(quoted) <= SHOWN_CHARACTERS else quoted[:SHOWN_CHARACTERS] + "..."
