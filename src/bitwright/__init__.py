"""Bitwright makes large language models small.

import bitwright
bitwright.quantize(bitwright.Recipe(model="MODEL", scheme="W4A16g128", method="rtn"), "OUTPUT")
print(bitwright.evaluate("OUTPUT", "text.txt", reference="MODEL").measurement)
"""

from bitwright.api import demo, evaluate, inspect, plan, quantize
from bitwright.core.errors import UserError
from bitwright.core.recipe import Recipe

__all__ = ["Recipe", "UserError", "demo", "evaluate", "inspect", "plan", "quantize"]
