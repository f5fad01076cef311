"""The functions that users call, from Python or through the command line.

Each is imported when it is first used, because only some of them need transformers.
"""

from importlib import import_module
from types import FunctionType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitwright.api.benching import Bench as Bench
    from bitwright.api.benching import bench as bench
    from bitwright.api.demonstrating import Demonstration as Demonstration
    from bitwright.api.demonstrating import demo as demo
    from bitwright.api.downloading import download as download
    from bitwright.api.evaluating import Evaluation as Evaluation
    from bitwright.api.evaluating import evaluate as evaluate
    from bitwright.api.exporting import Exported as Exported
    from bitwright.api.exporting import export as export
    from bitwright.api.inspecting import Inspection as Inspection
    from bitwright.api.inspecting import inspect as inspect
    from bitwright.api.planning import plan as plan
    from bitwright.api.quantizing import Result as Result
    from bitwright.api.quantizing import quantize as quantize
    from bitwright.api.quantizing import speaks as speaks
    from bitwright.api.verifying import verify as verify
    from bitwright.core.engine import Engine as Engine
    from bitwright.core.engine import engines as engines
    from bitwright.evaluation.loading import load as load
    from bitwright.methods import describe_methods as describe_methods
    from bitwright.prepare.plan import Plan as Plan
    from bitwright.stream.worker_pool import start_workers as start_workers
    from bitwright.verification.findings import Verification as Verification

_HOMES = {
    "bitwright.api.benching": (
        "Bench",
        "bench",
    ),
    "bitwright.api.demonstrating": (
        "Demonstration",
        "demo",
    ),
    "bitwright.api.downloading": ("download",),
    "bitwright.api.evaluating": (
        "Evaluation",
        "evaluate",
    ),
    "bitwright.api.exporting": (
        "Exported",
        "export",
    ),
    "bitwright.api.inspecting": (
        "Inspection",
        "inspect",
    ),
    "bitwright.api.planning": ("plan",),
    "bitwright.api.quantizing": (
        "Result",
        "quantize",
        "speaks",
    ),
    "bitwright.api.verifying": ("verify",),
    "bitwright.core.engine": (
        "Engine",
        "engines",
    ),
    "bitwright.evaluation.loading": ("load",),
    "bitwright.methods": ("describe_methods",),
    "bitwright.prepare.plan": ("Plan",),
    "bitwright.stream.worker_pool": ("start_workers",),
    "bitwright.verification.findings": ("Verification",),
}
__all__ = sorted(name for names in _HOMES.values() for name in names)


def __getattr__(name: str) -> Any:
    """Import a function, which then checks its arguments, or a class from its file."""
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'bitwright.api' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    if isinstance(value, FunctionType):
        from bitwright.api.arguments import checked

        value = checked(value)
    globals()[name] = value
    return value
