"""Bitwright makes large language models small.

import bitwright
bitwright.quantize(bitwright.Recipe(model="MODEL", scheme="W4A16g128", method="rtn"), "OUTPUT")
print(bitwright.evaluate("OUTPUT", "text.txt", reference="MODEL").measurement)
model = bitwright.load("OUTPUT")
"""

from bitwright.core.import_path import forget_current_folder, hide_kernels, is_program

if is_program():  # before anything else is imported: a model's folder may be the current one, with a torch.py in it
    forget_current_folder()
    hide_kernels()

from typing import TYPE_CHECKING, Any

from bitwright.core.errors import UserError
from bitwright.core.recipe import Recipe
from bitwright.plugin.hook import register_when_imported

if TYPE_CHECKING:
    from bitwright.api import download, evaluate, export, inspect, load, plan, quantize, verify

register_when_imported()

__all__ = ["Recipe", "UserError", "download", "evaluate", "export", "inspect", "load", "plan", "quantize", "verify"]


def __getattr__(name: str) -> Any:
    """The functions of ``api``, loaded when first used: torch and transformers take seconds to import."""
    if name in __all__:
        from bitwright import api

        value = globals()[name] = getattr(api, name)
        return value
    raise AttributeError(f"module 'bitwright' has no attribute {name!r}")
