"""The functions that users call, from Python or through the command line.

Each is imported when it is first used, because only some of them need transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitwright.api.benching import Bench, bench
    from bitwright.api.demonstrating import Demonstration, demo
    from bitwright.api.evaluating import Evaluation, evaluate
    from bitwright.api.exporting import Exported, export
    from bitwright.api.inspecting import Inspection, inspect
    from bitwright.api.planning import plan
    from bitwright.api.quantizing import Result, quantize, speaks
    from bitwright.api.verifying import verify
    from bitwright.core.engine import Engine, engines
    from bitwright.evaluation.loading import load
    from bitwright.methods import describe_methods
    from bitwright.prepare.plan import Plan
    from bitwright.stream.worker_pool import start_workers
    from bitwright.verification.findings import Verification

_HOMES = {
    "bitwright.api.benching": ("Bench", "bench"),
    "bitwright.api.demonstrating": ("Demonstration", "demo"),
    "bitwright.api.evaluating": ("Evaluation", "evaluate"),
    "bitwright.api.exporting": ("Exported", "export"),
    "bitwright.api.inspecting": ("Inspection", "inspect"),
    "bitwright.api.planning": ("plan",),
    "bitwright.api.quantizing": ("Result", "quantize", "speaks"),
    "bitwright.api.verifying": ("verify",),
    "bitwright.core.engine": ("Engine", "engines"),
    "bitwright.evaluation.loading": ("load",),
    "bitwright.methods": ("describe_methods",),
    "bitwright.stream.worker_pool": ("start_workers",),
    "bitwright.prepare.plan": ("Plan",),
    "bitwright.verification.findings": ("Verification",),
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
    "describe_methods",
    "engines",
    "evaluate",
    "export",
    "inspect",
    "load",
    "plan",
    "quantize",
    "speaks",
    "start_workers",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import a function or a class from its file."""
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'bitwright.api' has no attribute {name!r}")
    return getattr(import_module(home), name)
