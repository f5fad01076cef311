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
TRANSFORM, CLIPPING = "let", "lwc"
TRAINED = frozenset({"epochs", "batch_size", "aug_loss", "schedule", "precision"})


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
            _refuse_conflict(name, method, decision, writers)
        writers |= dict.fromkeys(method.decides, name)
        methods.append(method)
    return tuple(methods)


def fit(text: str, scheme: Scheme, topology: Topology | None, sites: str | None = None) -> tuple[str, str | None]:
    """The recipe that is really run, and what to say about it.

    With 16-bit activations and no site that can absorb a shift (RMSNorm architectures) ``let`` is left out, as
    OmniQuant's authors do, unless the recipe names the ``sites`` where it acts. ``topology`` is None where there are no
    blocks to transform.
    """
    listed = _parts(text)
    if topology is None:
        return "+".join(listed), None
    quantizes_activations = scheme.activations is not None or scheme.kv is not None
    keep = sites is not None or quantizes_activations or any(site.shift for site in topology.sites)
    parts = [part for part in listed if keep or part != TRANSFORM] or [CLIPPING]
    if TRANSFORM not in listed or keep:
        return "+".join(listed), None
    return "+".join(parts), (
        f"{TRANSFORM} is left out: 16-bit activations do not need it, and no site of this architecture can absorb a "
        f"shift. Going on with {'+'.join(parts)}; name --sites to keep it, which pays where channels are outliers"
    )


def learned(methods: tuple[Method, ...]) -> bool:
    """Whether any of these is trained."""
    return any(isinstance(method, Learned) for method in methods)


def used(methods: tuple[Method, ...]) -> frozenset[str]:
    """The settings that any of these listens to; training listens to its own."""
    trained = TRAINED if learned(methods) else frozenset[str]()
    return trained.union(*(method.uses for method in methods))


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


def _refuse_conflict(name: str, method: Method, decision: Decision, writers: dict[Decision, str]) -> None:
    if decision in writers and not (decision in method.starts_from and not learned((_named(writers[decision]),))):
        raise RecipeError(f"{writers[decision]} and {name} both decide the {decision}; keep one of them")
    later = sorted((d for d in writers if _ORDER.index(d) > _ORDER.index(decision)), key=_ORDER.index)
    if later:
        earlier = writers[later[0]]
        raise RecipeError(
            f"{name} decides the {decision}, which comes before the {later[0]} that {earlier} has already decided; "
            + (f"write {name}+{earlier}" if _can_follow(name, earlier) else "they do not go together, keep one of them")
        )


def _can_follow(first: str, second: str) -> bool:
    """Whether the second method can come after the first."""
    decided, next_ = _named(first).decides, _named(second).decides
    return max(map(_ORDER.index, decided)) < min(map(_ORDER.index, next_))
