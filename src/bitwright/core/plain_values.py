"""Values of a config.json that nobody has to be asked about: each function says whether a value is one of a kind."""

from collections.abc import Callable
from math import isfinite
from typing import Any


def is_count(value: Any) -> bool:
    """A whole number from 1 on."""
    return type(value) is int and value > 0


def is_number(value: Any) -> bool:
    """A finite number from 0 on."""
    return type(value) in (int, float) and isfinite(value) and value >= 0


def is_flag(value: Any) -> bool:
    """True or false."""
    return isinstance(value, bool)


def is_text(value: Any) -> bool:
    """Text."""
    return isinstance(value, str)


def is_token(value: Any) -> bool:
    """A token's number, or none."""
    return value is None or (type(value) is int and value >= 0)


def is_tokens(value: Any) -> bool:
    """A token's number, several, or none."""
    return all(type(one) is int and one >= 0 for one in value) if isinstance(value, list) else is_token(value)


def one_of(*known: Any) -> Callable[[Any], bool]:
    """Whether a value is one of these, of the same type."""
    return lambda value: any(type(value) is type(one) and value == one for one in known)
