"""What Bitwright does, as functions: the command line and Python call the same ones.

Each is loaded when it is first used: measuring takes transformers, quantizing without text does not.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitwright.api.benching import Bench, bench
    from bitwright.api.demonstrating import Demonstration, demo
    from bitwright.api.engine_table import Engine, engines
    from bitwright.api.evaluating import Evaluation, evaluate
    from bitwright.api.exporting import Exported, export
    from bitwright.api.findings import Verification
    from bitwright.api.inspecting import Inspection, inspect
    from bitwright.api.loading import load
    from bitwright.api.planning import Plan, plan
    from bitwright.api.quantizing import Result, quantize, speaks
    from bitwright.api.verifying import verify

_HOMES = {
    "benching": ("Bench", "bench"),
    "demonstrating": ("Demonstration", "demo"),
    "engine_table": ("Engine", "engines"),
    "evaluating": ("Evaluation", "evaluate"),
    "exporting": ("Exported", "export"),
    "inspecting": ("Inspection", "inspect"),
    "loading": ("load",),
    "planning": ("Plan", "plan"),
    "quantizing": ("Result", "quantize", "speaks"),
    "soundness": ("Verification",),
    "verifying": ("verify",),
}

__all__ = [
    "Bench",
    "Demonstration",
    "Engine",
    "Evaluation",
    "Exported",
    "Inspection",
    "Plan",
    "Result",
    "Verification",
    "bench",
    "demo",
    "engines",
    "evaluate",
    "export",
    "inspect",
    "load",
    "plan",
    "quantize",
    "speaks",
    "verify",
]


def __getattr__(name: str) -> Any:
    """A function or a class from the file that it lives in."""
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'bitwright.api' has no attribute {name!r}")
    return getattr(import_module(f"bitwright.api.{home}"), name)
