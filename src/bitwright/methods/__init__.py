"""How each paper takes the decisions: one paper, one file.

A recipe is an ordered list of methods joined by ``+``, or the name of a preset. Orders that cannot work are refused
before any weight is read.
"""

from bitwright.core.block import Topology
from bitwright.core.decisions import Decision
from bitwright.core.errors import RecipeError, nearest
from bitwright.core.method import Learned, Method
from bitwright.core.registry import find, names
from bitwright.core.scheme import Scheme

OMNIQUANT = "omniquant"
PRESETS = {OMNIQUANT: "let+lwc"}
TRANSFORM = "let"


def compose(text: str) -> tuple[Method, ...]:
    """The methods a recipe names, in order.

    Raises RecipeError for an unknown name, for two writers of one decision, and for an order in which a
    method would decide something that comes before what is already decided.
    """
    writers: dict[Decision, str] = {}
    methods = []
    for name in _parts(text):
        method = _named(name)
        for decision in sorted(method.decides, key=_ORDER.index):
            _refuse_conflict(name, decision, writers)
        writers |= dict.fromkeys(method.decides, name)
        methods.append(method)
    return tuple(methods)


def fit(text: str, scheme: Scheme, topology: Topology) -> tuple[str, str | None]:
    """The recipe that is really run, and what to say about it.

    With 16-bit activations a transform can only help where a shift can be absorbed (LayerNorm architectures); elsewhere
    ``let`` is left out, as OmniQuant's authors do.
    """
    listed = _parts(text)
    helps = scheme.activations is not None or scheme.kv is not None or any(site.shift for site in topology.sites)
    parts = [part for part in listed if helps or part != TRANSFORM]
    if len(parts) == len(listed) or not parts:
        return "+".join(listed), None
    return "+".join(parts), (
        f"{TRANSFORM} cannot help with 16-bit activations on this architecture: no site can absorb a shift. "
        f"Going on with {'+'.join(parts)}"
    )


def learned(methods: tuple[Method, ...]) -> bool:
    """Whether any of these is trained."""
    return any(isinstance(method, Learned) for method in methods)


def _parts(text: str) -> list[str]:
    """The methods' names, presets replaced by what they stand for."""
    names_given = [part.strip() for part in text.split("+")]
    return [name for given in names_given for name in PRESETS.get(given, given).split("+")]


def _named(name: str) -> Method:
    if name not in names("methods"):
        known = [*names("methods"), *PRESETS]
        raise RecipeError(f"there is no method '{name}'; {nearest(name, known)}")
    method: Method = find("methods", name).METHOD
    return method


_ORDER = list(Decision)


def _refuse_conflict(name: str, decision: Decision, writers: dict[Decision, str]) -> None:
    if decision in writers:
        raise RecipeError(f"{writers[decision]} and {name} both decide the {decision}; keep one of them")
    later = sorted((d for d in writers if _ORDER.index(d) > _ORDER.index(decision)), key=_ORDER.index)
    if later:
        raise RecipeError(
            f"{name} decides the {decision}, which comes before the {later[0]} that {writers[later[0]]} has "
            f"already decided; write {name}+{writers[later[0]]}"
        )
