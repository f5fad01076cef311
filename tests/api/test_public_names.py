"""The public names of the package are functions and classes, whatever else has been imported."""

import importlib
import pkgutil

import pytest

import bitwright


@pytest.mark.parametrize("name", bitwright.__all__)
def test_no_room_hides_a_public_name(name: str) -> None:
    for room in pkgutil.iter_modules(bitwright.__path__):
        if not room.name.startswith("_"):
            importlib.import_module(f"bitwright.{room.name}")
    assert callable(getattr(bitwright, name))
