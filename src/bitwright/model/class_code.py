"""What the code of a module's class does with the weights of linears inside of it.

Some modules hand a linear's weight to a kernel, or multiply by it themselves, on hardware or under settings that a
recorded call does not meet. Such a weight cannot be packed. Only transformers' own code is read; nothing of it is run.
"""

import ast
import inspect
import textwrap
from functools import cache
from typing import Any

from torch import nn

ASKED_ONLY = ("dtype", "device", "shape")
"""Attributes of a weight that can be asked for although it is packed."""


def weights_taken(module: nn.Module) -> frozenset[tuple[str, str]]:
    """Pairs (linear, "weight") such that the module's code takes ``self.linear.weight`` in evaluation.

    Code under a condition that this module's settings rule out does not count.
    """
    taken = set[tuple[str, str]]()

    def visit(node: ast.AST, around: ast.AST | None) -> None:
        if isinstance(node, ast.If):
            met = _met(node.test, module)
            branches = [*(node.body if met in (True, None) else ()), *(node.orelse if met in (False, None) else ())]
            for statement in branches:
                visit(statement, node)
            return
        inner = node.value if isinstance(node, ast.Attribute) else None
        if isinstance(node, ast.Attribute) and isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name):
            asked = isinstance(around, ast.Attribute) and around.attr in ASKED_ONLY
            if inner.value.id == "self" and not asked:
                taken.add((inner.attr, node.attr))
        for child in ast.iter_child_nodes(node):
            visit(child, node)

    tree = _tree(type(module))  # type: ignore[arg-type]  # mypy takes no class for hashable
    if tree is not None:
        visit(tree, None)
    return frozenset(taken)


def _met(test: ast.expr, module: nn.Module) -> bool | None:
    """Whether a condition on the module's own settings holds; None if it depends on something else."""
    if isinstance(test, ast.BoolOp):
        parts = [_met(value, module) for value in test.values]
        deciding = not isinstance(test.op, ast.And)  # one False decides an "and", one True an "or"
        if deciding in parts:
            return deciding
        return None if None in parts else not deciding
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        inner = _met(test.operand, module)
        return None if inner is None else not inner
    if isinstance(test, ast.Compare) and len(test.ops) == 1:
        left, right = _value(test.left, module), _value(test.comparators[0], module)
        compare = _COMPARISONS.get(type(test.ops[0]))
        known = left is not _UNKNOWN and right is not _UNKNOWN and compare is not None
        try:
            return bool(compare(left, right)) if known and compare is not None else None
        except TypeError:
            return None
    value = _value(test, module)
    return None if value is _UNKNOWN else bool(value)


_UNKNOWN = object()
_COMPARISONS: dict[type[ast.cmpop], Any] = {
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Is: lambda a, b: a is b,
    ast.IsNot: lambda a, b: a is not b,
}


def _value(node: ast.expr, module: nn.Module) -> Any:
    """The value of a constant, or of a plain attribute of the module."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        value = vars(module).get(node.attr, _UNKNOWN)
        return value if isinstance(value, bool | int | float | str | None) else _UNKNOWN
    return _UNKNOWN


@cache
def _tree(module_class: Any) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(module_class)))
    except (OSError, TypeError, SyntaxError):
        return None
