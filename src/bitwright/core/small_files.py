"""Small files: read a stranger's whole, within bounds, JSON among them; make our own values fit for JSON."""

import gc
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

from bitwright.core.errors import CheckpointError, UserError, shown

MIB = 2**20
CONFIG_BYTES = 32 * MIB
"""The most bytes of a config.json; that of a mixture of 60,000 experts, each named in it, has 5 MiB."""
SMALL_BYTES = 64 * MIB
"""The most bytes of any other small file; the largest tokenizer.json that is known has 35 MiB."""
MOST_VALUES = 2_500_000
"""The most values in one file of JSON; the largest tokenizer.json that is known has 2 million."""
MOST_LEVELS = 100
"""The most levels of lists and objects in each other; real files have fewer than 20."""

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def read_small(path: Path, most: int = SMALL_BYTES, error: type[UserError] = CheckpointError) -> bytes:
    """Read a file of at most ``most`` bytes.

    Raises ``error`` for a longer one, for what is no regular file (a pipe would be waited for, a device may have no
    end), and for a file that cannot be read.
    """
    try:
        require_regular(path, error)
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            raw = b"" if size > most else file.read(most + 1)
    except (OSError, ValueError) as fault:  # ValueError: a path that no file can have
        raise error(f"{path}: cannot be read: {fault}") from fault
    if max(size, len(raw)) > most:
        raise error(
            f"{path}: has {max(size, len(raw)):,} bytes, and such a file is never longer than {most:,}; it is damaged, "
            "or no such file: take it from where it came from again"
        )
    return raw


def require_regular(path: Path, error: type[UserError] = CheckpointError) -> None:
    """Raise ``error`` for a named pipe, a socket or a device. Raises OSError if there is nothing."""
    mode = path.stat().st_mode  # asked before it is opened, because opening a pipe would wait for ever
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        kind = "a named pipe" if stat.S_ISFIFO(mode) else "a device or a socket"
        raise error(f"{path}: {kind}, not a regular file; put the file itself there")


def parse_object(raw: bytes, where: str, most_values: int = MOST_VALUES) -> dict[str, Any]:
    """Read one JSON object from UTF-8 bytes, each key at most once.

    NaN and Infinity are let through: configs of real models contain them. Raises CheckpointError, which begins with
    `where`, for anything else, for more values than ``most_values``, and for values that are nested too deeply.
    """

    def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) == len(pairs):
            return values
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise CheckpointError(f"{where}: the key {shown(twice)} appears twice; which one holds cannot be known")

    refuse_too_many(raw, where, most_values)
    try:
        with uncollected():
            value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_keys)
    except RecursionError:
        raise _too_deep(where) from None
    except ValueError as error:  # not UTF-8, not JSON, or an integer of thousands of digits
        raise CheckpointError(f"{where}: not JSON ({error}); the file is damaged, fetch it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: a JSON object was expected, found a {type(value).__name__}")
    _refuse_deep(value, where)
    return value


@contextmanager
def uncollected() -> Iterator[None]:
    """A context in which Python does not look for garbage: among millions of new values it takes half of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def refuse_too_many(raw: bytes, where: str, most: int = MOST_VALUES) -> None:
    """Raise CheckpointError if JSON has more values than fit into memory, before it is parsed.

    A value takes up to 30 times the memory of its text. Commas and brackets in texts count too.
    """
    values = sum(raw.count(mark) for mark in (b",", b"[", b"{"))
    if values > most:
        raise CheckpointError(
            f"{where}: the JSON has about {values:,} values, and such a file never has more than {most:,}; it is "
            "damaged, or no such file: fetch it again"
        )


def _refuse_deep(value: Any, where: str) -> None:
    level, levels = [value], 0
    while level:
        levels += 1
        if levels > MOST_LEVELS:
            raise _too_deep(where)
        inner = (item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer))
        level = [item for item in inner if isinstance(item, dict | list)]


def _too_deep(where: str) -> CheckpointError:
    return CheckpointError(f"{where}: the JSON is nested too deeply to be what it claims to be")


def dumped(value: Any, indent: int | None = None, separators: tuple[str, str] | None = None) -> str:
    """Write a value as JSON that can be encoded in UTF-8: halves of surrogate pairs, as paths have them, escaped.

    >>> dumped({"é": b"\\xff".decode("utf-8", "surrogateescape")})
    '{"é": "\\\\udcff"}'
    """
    text = json.dumps(value, indent=indent, separators=separators, ensure_ascii=False)
    return _LONE_SURROGATE.sub(lambda half: f"\\u{ord(half[0]):04x}", text)


def is_text(value: str) -> bool:
    """Whether a text can be written as UTF-8: JSON can spell half of a surrogate pair, which is no character."""
    if value.isascii():
        return True
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def plain(value: Any) -> Any:
    """Replace NaN and infinity, for which JSON has no word, by null, in dicts and lists too.

    >>> plain({"perplexity": float("inf"), "windows": (1, 2.5)})
    {'perplexity': None, 'windows': [1, 2.5]}
    """
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value
