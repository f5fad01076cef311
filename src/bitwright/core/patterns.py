"""Regular expressions that a stranger wrote: refused if matching them against names could take for ever.

Python's matcher tries every way in which repetitions can share a text. Repetitions inside of repetitions, ``(a+)+``,
have exponentially many; k of them one after the other have about n**k / k! in a text of n characters.
"""

import re
from collections.abc import Collection, Iterable, Iterator
from math import factorial
from time import process_time
from typing import Any

from bitwright.core.errors import CheckpointError, shown

MOST_CHARACTERS, MOST_STEPS = 1000, 10**8
"""The most characters of a pattern, and the most steps of one match: about a second."""
MOST_TEXTS, MOST_PATTERNS, MOST_SECONDS = 100_000, 4_000, 4.0
"""The most texts of a config beside one for each tensor, the most patterns among them, and the most seconds.

In so many seconds the patterns have to be matched with all names of tensors. Names in the form of a pattern are none.
"""
MARKS = ("re:", "+:", "-:")
"""The beginnings of patterns in compressed-tensors' and GPTQModel's configs."""


class PatternError(CheckpointError):
    """A regular expression that is none, or that could take for ever."""


_NAME = re.compile(r"\^?(?:[\w\-/ .]|\\[.\-_/])*\$?")
"""A name in the form of a pattern, which matches in one way."""
_PART = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?#[^)]*\)|\((?:\?(?:P<\w+>|<?[=!]|[aiLmsux-]*:|>|P=))?|.", re.DOTALL
)
_VERBOSE = "patterns with spaces and comments in them (flag x) are not read"
_REPEAT = re.compile(r"(\*|\+|\?|\{(\d*)(,?)(\d*)\})[?+]?")


def check_patterns(config: object, names: Collection[str]) -> None:
    """Check the patterns anywhere in a quantization_config against the names of a model's tensors.

    Raises PatternError for a pattern that is none, or that takes too long.
    """
    texts = _texts(config)
    if len(texts) > MOST_TEXTS + len(names):
        raise PatternError(
            f"its quantization_config has {len(texts):,} names and other texts, far more than there are tensors "
            f"({len(names):,}); download or quantize the model again"
        )
    longest = max(map(len, names), default=0)
    patterns = list(dict.fromkeys(_patterns(texts)))
    if len(patterns) > MOST_PATTERNS:
        raise PatternError(
            f"its quantization_config has {len(patterns):,} regular expressions, more than {MOST_PATTERNS:,}; name the "
            "linears instead"
        )
    compiled = [checked(pattern, longest) for pattern in patterns]
    ends = process_time() + MOST_SECONDS
    for pattern in compiled:
        for name in names:
            pattern.match(name)
            if process_time() > ends:
                raise PatternError(
                    f"the {len(compiled):,} regular expressions in its quantization_config take more than "
                    f"{MOST_SECONDS:g} seconds for {len(names):,} tensors, at {shown(pattern.pattern)}; name the "
                    "linears instead, or write plainer ones"
                )


def checked(pattern: str, longest: int) -> re.Pattern[str]:
    """Compile a pattern for texts of at most ``longest`` characters. Raises PatternError."""
    if len(pattern) > MOST_CHARACTERS:
        raise PatternError(f"the regular expression {shown(pattern)} has more than {MOST_CHARACTERS} characters")
    try:
        compiled = re.compile(pattern)
        if compiled.flags & re.VERBOSE:
            raise re.error(_VERBOSE)
        ways = _ways(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise PatternError(f"{shown(pattern)} is no regular expression: {error}") from None
    if ways is None or ways.of(longest) > MOST_STEPS:
        why = "repeats what repeats or chooses already" if ways is None else "repeats or chooses too often"
        raise PatternError(
            f"the regular expression {shown(pattern)} {why}: to match it with a name of {longest} characters could "
            "take for ever; write it plainer, or name the linears"
        )
    return compiled


def _texts(config: object) -> list[str]:
    """All texts in a config, keys too."""
    texts: list[str] = []
    waiting: list[Any] = [config]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, dict):
            waiting += [*inner.keys(), *inner.values()]
        elif isinstance(inner, list):
            waiting += inner
        elif isinstance(inner, str):
            texts.append(inner)
    return texts


def _patterns(texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts that are, or that some library takes for, patterns with choices."""
    for text in texts:
        marked = text.startswith(MARKS)
        pattern = text[text.index(":") + 1 :] if marked else text
        if _NAME.fullmatch(pattern) is None and (marked or (any(c in pattern for c in "*+{?|") and _compiles(pattern))):
            yield pattern


def _compiles(text: str) -> bool:
    try:
        re.compile(text[: MOST_CHARACTERS + 1])
    except (re.error, OverflowError, RecursionError):
        return False
    return True


class _Ways:
    """In how many ways a part of a pattern can match: how many parts of it repeat, times its other choices."""

    def __init__(self, repeats: int = 0, choices: int = 1) -> None:
        self.repeats, self.choices = repeats, choices
        self.most, self.sum = 0, 0  # of the alternatives before this one

    @property
    def chooses(self) -> bool:
        """Whether there is more than one way."""
        return self.repeats > 0 or self.choices > 1

    def of(self, length: int) -> float:
        """The number of ways in a text of this length."""
        repeats = min(self.repeats, 99)
        return self.choices * float(length + 1) ** repeats / factorial(repeats)

    def then(self, part: "_Ways", times: int = 1) -> None:
        """Add a part that follows, so many times."""
        self.repeats += part.repeats * times
        self.choices = min(self.choices * part.choices ** min(times, 64), MOST_STEPS + 1)

    def otherwise(self) -> None:
        """Begin another alternative."""
        self.most, self.sum = max(self.most, self.repeats), self.sum + self.choices
        self.repeats, self.choices = 0, 1

    def whole(self) -> "_Ways":
        """All alternatives together."""
        return _Ways(max(self.most, self.repeats), self.sum + self.choices)


def _ways(pattern: str) -> _Ways | None:
    """Count the ways of a pattern; None if a part with several ways repeats. Raises re.error for verbose ones."""
    groups, at = [_Ways()], 0
    while at < len(pattern):
        match = _PART.match(pattern, at)
        assert match is not None, "any character is a part"
        text, at = match.group(), match.end()
        if text.startswith("(?") and "x" in text and "<" not in text:
            raise re.error(_VERBOSE)
        if text.startswith("(") and not text.startswith(("(?#", "(?P=")):
            groups.append(_Ways())
            continue
        if text == "|":
            groups[-1].otherwise()
            continue
        part = groups.pop().whole() if text == ")" and len(groups) > 1 else _Ways()
        times = _REPEAT.match(pattern, at)
        at = at if times is None else times.end()
        repeated = _repeated(part, times)
        if repeated is None:
            return None
        groups[-1].then(*repeated)
    return groups[0].whole()


def _repeated(part: _Ways, times: re.Match[str] | None) -> tuple[_Ways, int] | None:
    """A part, and how often it follows; None if it has several ways and is repeated any number of times."""
    if times is None:
        return part, 1
    if times[1] == "?":
        return _Ways(part.repeats, part.choices + 1), 1
    if times[1] not in "*+" and not times[3]:
        return part, int(times[2] or 1)
    return None if part.chooses else (_Ways(1), 1)
