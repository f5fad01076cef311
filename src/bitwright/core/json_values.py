"""JSON: read a file that a stranger wrote, check the kinds of its values, and make our own values fit for it."""

import json
from collections import Counter
from collections.abc import Callable
from math import isfinite
from typing import Any

from bitwright.core.errors import CheckpointError, shown


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """Read one JSON object from UTF-8 bytes, each key at most once.

    NaN and Infinity are let through: configs of real models contain them. Raises CheckpointError, which begins with
    `where`, for anything else.
    """

    def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) == len(pairs):
            return values
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise CheckpointError(f"{where}: the key {shown(twice)} appears twice; which one holds cannot be known")

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_keys)
    except RecursionError:
        raise CheckpointError(f"{where}: the JSON is nested too deeply to be what it claims to be") from None
    except ValueError as error:  # not UTF-8, not JSON, or an integer of thousands of digits
        raise CheckpointError(f"{where}: not JSON ({error}); the file is damaged, fetch it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: a JSON object was expected, found a {type(value).__name__}")
    return value


def is_count(value: Any) -> bool:
    """Whether a value is a whole number of at least 1."""
    return type(value) is int and value > 0


def is_number(value: Any) -> bool:
    """Whether a value is a finite number of at least 0."""
    return type(value) in (int, float) and isfinite(value) and value >= 0


def is_flag(value: Any) -> bool:
    """Whether a value is true or false."""
    return isinstance(value, bool)


def is_text(value: Any) -> bool:
    """Whether a value is a string."""
    return isinstance(value, str)


def is_token(value: Any) -> bool:
    """Whether a value is a token's id, or null."""
    return value is None or (type(value) is int and value >= 0)


def is_tokens(value: Any) -> bool:
    """Whether a value is a token's id, a list of ids, or null."""
    return all(type(item) is int and item >= 0 for item in value) if isinstance(value, list) else is_token(value)


def one_of(*known: Any) -> Callable[[Any], bool]:
    """A check whether a value is one of these, and of the same type."""
    return lambda value: any(type(value) is type(item) and value == item for item in known)


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
