"""What Bitwright does, as functions: the command line and Python call the same ones."""

from bitwright.api.demonstrating import Demonstration, demo
from bitwright.api.evaluating import Evaluation, evaluate
from bitwright.api.exporting import Exported, export
from bitwright.api.inspecting import Inspection, inspect
from bitwright.api.loading import load
from bitwright.api.planning import Plan, plan
from bitwright.api.quantizing import Result, quantize, speaks
from bitwright.api.verifying import Verification, verify

__all__ = [
    "Demonstration",
    "Evaluation",
    "Exported",
    "Inspection",
    "Plan",
    "Result",
    "Verification",
    "demo",
    "evaluate",
    "export",
    "inspect",
    "load",
    "plan",
    "quantize",
    "speaks",
    "verify",
]
