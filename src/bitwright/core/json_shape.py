"""Shapes of JSON values: what a stranger's file must look like before the code relies on it.

A shape checks types, not whether the values make sense together. Null counts as left out, unless a key is needed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Protocol

from bitwright.core.errors import CheckpointError, shown
from bitwright.core.small_files import is_text

DEEPEST = 64
"""The levels of objects and lists that a shape follows; no real file has so many."""
LARGEST = 2**63 - 1


class Shape(Protocol):
    """What a value may be."""

    @property
    def wanted(self) -> str:
        """The shape in words: ``a text``."""

    def fits(self, value: Any) -> bool:
        """Whether a value is of this kind; what it contains is not looked at."""

    def inside(self, value: Any) -> Iterator[tuple[str | int, Any, "Shape"]]:
        """Yield what a value contains: key, value, shape. Raises ValueError for a key that is needed and missing."""


@dataclass(frozen=True)
class Leaf:
    """A value that contains no others."""

    wanted: str
    kinds: tuple[type, ...]

    def fits(self, value: Any) -> bool:
        """Whether a value is of one of the types; True is no number, and half of a surrogate pair no text."""
        if not isinstance(value, self.kinds) or (isinstance(value, bool) and bool not in self.kinds):
            return False
        if isinstance(value, int) and float not in self.kinds:
            return 0 <= value <= LARGEST
        return is_text(value) if isinstance(value, str) else not isinstance(value, float) or isfinite(value)

    def inside(self, value: Any) -> Iterator[tuple[str | int, Any, Shape]]:
        """Yield nothing."""
        return iter(())


TEXT, WHOLE = Leaf("a text", (str,)), Leaf("a whole number, 0 or more", (int,))
NUMBER, FLAG = Leaf("a number", (int, float)), Leaf("true or false", (bool,))


@dataclass(frozen=True)
class Items:
    """A list whose items have one shape; ``length`` of them, if that is given."""

    item: Shape
    length: int | None = None

    @property
    def wanted(self) -> str:
        """The shape in words."""
        return "a list" if self.length is None else f"a list of {self.length} values"

    def fits(self, value: Any) -> bool:
        """Whether a value is a list of that length."""
        return isinstance(value, list) and self.length in (None, len(value))

    def inside(self, value: Any) -> Iterator[tuple[str | int, Any, Shape]]:
        """Yield the items; an item is never null."""
        return ((n, item, Needed(self.item)) for n, item in enumerate(value))


@dataclass(frozen=True)
class Keys:
    """An object: ``keys`` with their shapes, ``others`` that of every other key; the keys in ``needs`` are there."""

    keys: Mapping[str, Shape] = field(default_factory=dict)
    others: Shape | None = None
    needs: tuple[str, ...] = ()
    wanted: str = "an object"

    def fits(self, value: Any) -> bool:
        """Whether a value is an object."""
        return isinstance(value, dict)

    def inside(self, value: Any) -> Iterator[tuple[str | int, Any, Shape]]:
        """Yield the values of the keys that have a shape. Raises ValueError for a key that is missing."""
        for key in self.needs:
            if value.get(key) is None:
                raise ValueError(f"has no key {key!r}")
        if self.others is not None and (odd := next((key for key in value if not is_text(key)), None)) is not None:
            raise ValueError(f"has the key {shown(odd)}, which is no text")
        for key, item in value.items():
            shape = self.keys.get(key, self.others)
            if shape is not None:
                yield key, item, shape


@dataclass(frozen=True)
class Either:
    """A value of one of several shapes: the first that fits."""

    shapes: tuple[Shape, ...]

    @property
    def wanted(self) -> str:
        """The shapes in words."""
        return " or ".join(shape.wanted for shape in self.shapes)

    def fits(self, value: Any) -> bool:
        """Whether any shape fits."""
        return any(shape.fits(value) for shape in self.shapes)

    def inside(self, value: Any) -> Iterator[tuple[str | int, Any, Shape]]:
        """Yield what the first shape that fits finds inside."""
        return next(shape for shape in self.shapes if shape.fits(value)).inside(value)


@dataclass(frozen=True)
class Needed:
    """A shape that null does not have."""

    shape: Shape

    @property
    def wanted(self) -> str:
        """The shape in words."""
        return self.shape.wanted

    def fits(self, value: Any) -> bool:
        """Whether the shape fits."""
        return self.shape.fits(value)

    def inside(self, value: Any) -> Iterator[tuple[str | int, Any, Shape]]:
        """Yield what the shape finds inside."""
        return self.shape.inside(value)


def require_shape(value: Any, shape: Shape, where: str, mend: str) -> None:
    """Raise CheckpointError for a value of another shape: file, key, what was found; ``mend`` says what to do."""
    wrong = _wrong(value, shape, 0)
    if wrong is not None:
        keys, fault = wrong
        at = f"{where}: {shown(keys.lstrip('.'))[1:-1]}" if keys else where
        raise CheckpointError(f"{at} {fault}; {mend}")


def _wrong(value: Any, shape: Shape, depth: int) -> tuple[str, str] | None:
    """The keys that lead to the first value of another shape, and what is wrong with it; None if there is none."""
    if value is None and not isinstance(shape, Needed):
        return None
    if not shape.fits(value):
        return "", f"is {shown(value)}, and {shape.wanted} was expected"
    if depth > DEEPEST:
        return "", "is nested too deeply to be what it claims to be"
    try:
        for key, item, inner in shape.inside(value):
            if (wrong := _wrong(item, inner, depth + 1)) is not None:
                return (f"[{key}]" if isinstance(key, int) else f".{key}") + wrong[0], wrong[1]
    except ValueError as error:
        return "", str(error)
    return None
