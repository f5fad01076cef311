"""One line of a GGUF file's metadata: a key, a value and its type."""

from dataclasses import dataclass
from typing import Any

from gguf import GGUFValueType as ValueType


@dataclass(frozen=True)
class Entry:
    """``of`` is the type of an array's elements."""

    key: str
    value: Any
    type: ValueType
    of: ValueType | None = None


def text(key: str, value: str) -> Entry:
    """A text."""
    return Entry(key, value, ValueType.STRING)


def count(key: str, value: int) -> Entry:
    """A whole number from 0."""
    return Entry(key, int(value), ValueType.UINT32)


def number(key: str, value: float) -> Entry:
    """A number in float32."""
    return Entry(key, float(value), ValueType.FLOAT32)


def flag(key: str, value: bool) -> Entry:
    """Yes or no."""
    return Entry(key, bool(value), ValueType.BOOL)


def texts(key: str, values: list[str]) -> Entry:
    """A list of texts, not empty."""
    return Entry(key, values, ValueType.ARRAY, ValueType.STRING)


def integers(key: str, values: list[int]) -> Entry:
    """A list of integers, not empty."""
    return Entry(key, values, ValueType.ARRAY, ValueType.INT32)


def numbers(key: str, values: list[float]) -> Entry:
    """A list of numbers in float32, not empty."""
    return Entry(key, values, ValueType.ARRAY, ValueType.FLOAT32)
