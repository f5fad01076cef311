"""Several sources of text in one option, each with its share: ``a.jsonl:2,b.txt:1``."""

import os
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from bitwright.calibration.texts import BUILTIN, MIX
from bitwright.core.errors import CalibrationError

_WITH_SHARE = re.compile(r"(.+):([0-9]{1,6}(?:\.[0-9]{1,6})?)", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """The name of a file, a folder, a dataset or a text that comes with Bitwright, and its share of the segments."""

    name: str
    share: Fraction = Fraction(1)


def sources_of(text: str) -> tuple[Source, ...]:
    """Divide the value of ``--calibration`` or ``--text`` into its sources.

    Commas divide, and a number after a colon is a share; but a path that exists is one name, with all its commas and
    colons. A number is no share at the end of the name of a lone dataset, where it may be a config. Raises
    CalibrationError.

    >>> [(source.name, str(source.share)) for source in sources_of("a.jsonl:2,b.txt:0.5")]
    [('a.jsonl', '2'), ('b.txt', '1/2')]
    """
    if _exists(text) or "," not in text:
        return (_source(text, alone=True),)
    parts, sources = text.split(","), list[Source]()
    while parts:
        name, count = _longest(parts)
        if not name.strip():
            raise CalibrationError(f"'{text}' names nothing between two commas; write it like a.jsonl:2,b.txt:1")
        sources.append(_source(name, alone=False))
        del parts[:count]
    names = [source.name for source in sources]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise CalibrationError(f"'{text}' names '{twice}' twice; name it once, with a share: {twice}:2")
    return tuple(sources)


def _longest(parts: list[str]) -> tuple[str, int]:
    """The name at the beginning, and its number of parts: several if a path with commas in it exists."""
    for count in range(len(parts), 1, -1):
        name = ",".join(parts[:count])
        if _exists(name) or ((match := _WITH_SHARE.fullmatch(name)) and _exists(match[1])):
            return name, count
    return parts[0], 1


def _source(text: str, alone: bool) -> Source:
    """One source, with the share that stands behind its last colon."""
    text = text if alone else text.strip()
    match = None if _exists(text) else _WITH_SHARE.fullmatch(text)
    if match is None or (alone and match[1] not in (BUILTIN, MIX) and not _exists(match[1])):
        return Source(_at_home(text))
    share = Fraction(match[2])
    if not share:
        raise CalibrationError(f"'{text}' has a share of 0; leave '{match[1]}' out, or give it a share above 0")
    return Source(_at_home(match[1]), share)


def shares_of(samples: int, sources: tuple[Source, ...]) -> list[int]:
    """Divide a number of segments by the shares; the largest remainders are rounded up. Raises CalibrationError."""
    whole = sum(source.share for source in sources)
    exact = [samples * source.share / whole for source in sources]
    counts = [int(count) for count in exact]
    order = sorted(range(len(sources)), key=lambda index: (counts[index] - exact[index], index))
    for index in order[: samples - sum(counts)]:
        counts[index] += 1
    for source, count in zip(sources, counts, strict=True):
        if not count:
            raise CalibrationError(
                f"of {samples} segments none is left for '{source.name}' with its share of {float(source.share):g} in "
                f"{float(whole):g}; ask for more segments, or give it a larger share"
            )
    return counts


def _exists(text: str) -> bool:
    try:
        return Path(_at_home(text)).exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _at_home(text: str) -> str:
    """A path with ``~`` replaced; a shell does so at the beginning of a word only."""
    return os.path.expanduser(text) if text.startswith("~") else text
