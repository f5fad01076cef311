"""Check the arguments of public functions: one of a wrong type is a clear error, before anything is done with it."""

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from types import UnionType
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from bitwright.core.errors import UserError, shown

P = ParamSpec("P")
R = TypeVar("R")
OF_TORCH = ("device", "dtype")
"""Arguments that are names, and may also be torch's own objects."""


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function raise UserError for arguments whose types are not those of its annotations."""
    signature = inspect.signature(function)

    @cache
    def hints() -> Mapping[str, Any]:
        return get_type_hints(function)

    @wraps(function)
    def checking(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            hint = hints().get(name, Any)
            if not _fits(value, hint) and not (name in OF_TORCH and type(value).__module__ == "torch"):
                raise UserError(f"{function.__name__}({name}={shown(value)}): {_words(hint)} was expected")
        return function(*args, **kwargs)

    return checking


def _fits(value: object, hint: Any) -> bool:
    """Whether a value is of a type; classes of ours, flags and the contents of most lists are not looked at."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, inner) for inner in get_args(hint))
    if hint is type(None):
        return value is None
    if hint is str:
        return isinstance(value, str)
    if hint is int:
        return hasattr(value, "__index__")
    if origin is Sequence:
        inner = get_args(hint)[0]
        return (
            isinstance(value, Sequence) and not isinstance(value, bytes) and all(_fits(item, inner) for item in value)
        )
    if isinstance(hint, type) and issubclass(hint, os.PathLike):
        return isinstance(value, os.PathLike) and isinstance(os.fspath(value), str)
    return callable(value) if origin is Callable else True


def _words(hint: Any) -> str:
    """A type in words: ``a text, a path or None``."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_words(inner) for inner in get_args(hint))
    if hint is type(None):
        return "None"
    if get_origin(hint) is Sequence:
        return f"a list, each {_words(get_args(hint)[0])},"
    return {str: "a text", int: "a whole number"}.get(hint) or ("a path" if isinstance(hint, type) else "a function")
