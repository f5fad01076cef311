"""Linears of one model that need one scheme for an engine, and what to say if two of them have not.

What is said goes on from "the engine does not run", and ends with what would do.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from bitwright.core.scheme import Scheme
from bitwright.core.weight import starred

JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Last parts of the names of linears that some engines join into one linear, their outputs one after the other."""

Schemes = Mapping[str, Scheme | None]
"""All linears of a model by name, a stack of experts as one, each with its scheme; None: left in full precision."""


def joined_name(linear: str) -> str:
    """The name under which a linear is joined with others, its own if it is not.

    >>> joined_name("model.layers.0.self_attn.k_proj")
    'model.layers.0.self_attn.q_proj, k_proj, v_proj'
    """
    parent, dot, leaf = linear.rpartition(".")
    return next((f"{parent}{dot}{', '.join(leaves)}" for leaves in JOINED if leaf in leaves), linear)


def joined_apart(schemes: Schemes) -> str | None:
    """Name two linears that are joined and have different schemes; None if there are no such two."""
    sets = [linears for name, linears in _sets(schemes, joined_name).items() if name not in schemes]
    pair = _first_pair(sets, schemes)
    if pair is None:
        return None
    linears, one, other = pair
    return f"{_beside(one, other, schemes)}, which it joins: {_one_scheme(linears, sets, schemes)}"


def experts_apart(schemes: Schemes, *, of_model: bool) -> str | None:
    """Name two experts of one layer, or ``of_model`` of any two layers, with different schemes; None if there are no
    such two."""
    experts = [name for name in schemes if "experts" in name.split(".")]
    sets = [experts] if of_model else list(_sets(experts, _experts_of_layer).values())
    pair = _first_pair(sets, schemes)
    if pair is None:
        return None
    linears, one, other = pair
    scheme, which = _largest(linears, schemes), "of the model" if of_model else "of a layer"
    pattern = "*.experts.*" if of_model else f"{_experts_of_layer(one)}.*"
    return (
        f"{_beside(one, other, schemes)}: all experts {which} need one scheme, --scheme-for '{pattern}={scheme}', or "
        f"none, --exclude '{pattern}'"
    )


def any_apart(schemes: Schemes) -> str | None:
    """Name two quantized linears with different schemes; None if there are no such two."""
    pair = _first_pair([[name for name, scheme in schemes.items() if scheme is not None]], schemes)
    if pair is None:
        return None
    return f"{_beside(pair[1], pair[2], schemes)}: all linears need one scheme there, leave --scheme-for out"


def _sets(linears: Iterable[str], key: Callable[[str], str]) -> dict[str, list[str]]:
    """Linears by what they share."""
    sets: dict[str, list[str]] = {}
    for name in linears:
        sets.setdefault(key(name), []).append(name)
    return sets


def _experts_of_layer(linear: str) -> str:
    """The name of the module that holds an expert and the others of its layer."""
    parts = linear.split(".")
    return ".".join(parts[: parts.index("experts") + 1])


def _first_pair(sets: Iterable[Sequence[str]], schemes: Schemes) -> tuple[Sequence[str], str, str] | None:
    """The first set whose linears have not one scheme, and two of them."""
    for linears in sets:
        for other in linears[1:]:
            if schemes[other] != schemes[linears[0]]:
                return linears, linears[0], other
    return None


def _beside(one: str, other: str, schemes: Schemes) -> str:
    parent, _, leaf = other.rpartition(".")
    short = leaf if parent == one.rpartition(".")[0] else other
    return f"{one} {_at(schemes[one])} beside {short} {_at(schemes[other])}"


def _at(scheme: Scheme | None) -> str:
    return "in full precision" if scheme is None else f"at {scheme}"


def _largest(linears: Iterable[str], schemes: Schemes) -> Scheme:
    """The scheme with most bits among those of quantized linears, the first of equals."""
    return max((s for name in linears if (s := schemes[name]) is not None), key=lambda scheme: scheme.weight.bits)


def _one_scheme(linears: Sequence[str], sets: Sequence[Sequence[str]], schemes: Schemes) -> str:
    """How linears get one scheme: in all blocks at once if those disagree in the same way everywhere."""

    def kind(names: Sequence[str]) -> list[str]:
        return [starred(name) for name in names]

    def given(names: Sequence[str]) -> list[Scheme | None]:
        return [schemes[name] for name in names]

    alike = [names for names in sets if kind(names) == kind(linears)]
    everywhere = len(alike) > 1 and all(given(names) == given(linears) for names in alike)
    pattern = starred if everywhere else str
    if None in given(linears):
        quantized = ",".join(pattern(name) for name in linears if schemes[name] is not None)
        return f"leave all of them in full precision, --exclude '{quantized}', or none"
    scheme = _largest(linears, schemes)
    others = [f"--scheme-for '{pattern(name)}={scheme}'" for name in linears if schemes[name] != scheme]
    return f"give them one scheme, {' '.join(others)}"
