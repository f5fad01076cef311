"""How each paper takes the decisions: one paper, one file.

A recipe is an ordered list of methods joined by ``+``. Orders that cannot work are refused before any
weight is read.
"""

from bitwright.core.decisions import Decision
from bitwright.core.errors import RecipeError
from bitwright.core.method import Method
from bitwright.core.registry import find


def compose(text: str) -> tuple[Method, ...]:
    """The methods a recipe names, in order.

    Raises RecipeError for an unknown name, for two writers of one decision, and for an order in which a
    method would decide something that comes before what is already decided.
    """
    writers: dict[Decision, str] = {}
    methods = []
    for name in text.split("+"):
        method = find("methods", name.strip()).METHOD
        for decision in sorted(method.decides, key=_ORDER.index):
            _refuse_conflict(name, decision, writers)
        writers |= dict.fromkeys(method.decides, name)
        methods.append(method)
    return tuple(methods)


_ORDER = list(Decision)


def _refuse_conflict(name: str, decision: Decision, writers: dict[Decision, str]) -> None:
    if decision in writers:
        raise RecipeError(f"{writers[decision]} and {name} both decide the {decision}; keep one of them")
    later = [d for d in writers if _ORDER.index(d) > _ORDER.index(decision)]
    if later:
        raise RecipeError(
            f"{name} decides the {decision}, which comes before the {later[0]} that {writers[later[0]]} has "
            f"already decided; write {name}+{writers[later[0]]}"
        )
