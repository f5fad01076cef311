"""Registration by file name: ``methods/rtn.py`` is the method ``rtn``.

A user writes hyphens for the file's underscores: ``compressed-tensors``. A file whose name begins with an underscore is
a part of another.
"""

import pkgutil
import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from bitwright.core.errors import RecipeError, nearest

if TYPE_CHECKING:
    from bitwright.core.block import Architecture
    from bitwright.core.format import Format

METHODS = "methods"


def names(room: str) -> tuple[str, ...]:
    """The names registered in a room ("methods", "formats", "families"), as a user writes them."""
    files = pkgutil.iter_modules(_places(f"bitwright.{room}"))
    return tuple(sorted(file.name.replace("_", "-") for file in files if file.name[0] != "_"))


def modules(room: str) -> dict[str, ModuleType]:
    """Every registered module of a room by its name."""
    return {name: _module(room, name) for name in names(room)}


def format_of(name: str) -> "Format":
    """The format of this name. Raises RecipeError with the nearest known name."""
    format: Format = find("formats", name).FORMAT
    return format


def formats() -> "tuple[Format, ...]":
    """Every format, by name; imports them all."""
    return tuple(format_of(name) for name in names("formats"))


def find(room: str, name: str) -> ModuleType:
    """The module registered under a name. Raises RecipeError with the nearest known name."""
    require_name(room, name)
    return _module(room, name)


def require_name(room: str, name: str) -> None:
    """Raise RecipeError, with the nearest known name, for one that is not registered; nothing is imported."""
    if name not in names(room):
        raise RecipeError(f"there is no {room.rstrip('s')} '{name}'; {nearest(name, names(room))}")


def compose(methods: str) -> object:
    """Compose the methods that a text names, as ``methods`` does. Raises RecipeError for what is none, or a mixture."""
    room: Any = import_module(f"bitwright.{METHODS}")
    return room.compose(methods)


def _places(package: str) -> list[str]:
    """The folders of a package, which is not imported for it: that may take torch."""
    if package in sys.modules:
        return list(sys.modules[package].__path__)
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations is not None
    return list(spec.submodule_search_locations)


def _module(room: str, name: str) -> ModuleType:
    return import_module(f"bitwright.{room}.{name.replace('-', '_')}")


def architecture_of(model_type: str) -> "Architecture | None":
    """What a file in ``families/`` knows of the models of a ``model_type``; None if there is no such file."""
    name = model_type.replace("_", "-")
    architecture: Architecture | None = find("families", name).ARCHITECTURE if name in names("families") else None
    return architecture
