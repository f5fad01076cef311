"""Linears of one model that need one scheme for an engine, and what to say if two of them have not.

What is said goes on from "the engine does not run", and ends with what would do.
"""

import re
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


def is_expert(linear: str) -> bool:
    """Whether a linear is an expert, or a stack of them."""
    return "experts" in linear.split(".")


def advised(reason: str) -> list[tuple[str, Scheme]]:
    """The patterns and schemes of --scheme-for that a message of this file advises."""
    return [(pattern, Scheme.parse(text)) for pattern, text in re.findall(r"--scheme-for '(\S+?)=(\S+?)'", reason)]


def joined_apart(schemes: Schemes) -> str | None:
    """Name two linears that are joined and have different schemes; None if there are no such two."""
    sets = [linears for name, linears in _sets(schemes, joined_name).items() if name not in schemes]
    pair = _first_pair(sets, schemes)
    if pair is None:
        return None
    linears, first, second = pair
    return f"{_beside(first, second, schemes)}, which it joins: {_one_scheme(linears, sets, schemes)}"


def experts_apart(schemes: Schemes, *, of_model: bool) -> str | None:
    """Name two experts of a layer, or ``of_model`` of the model, with different schemes; None if there are none."""
    experts = [name for name in schemes if is_expert(name)]
    sets = [experts] if of_model else list(_sets(experts, _experts_of_layer).values())
    pair = _first_pair(sets, schemes)
    if pair is None:
        return None
    linears, first, second = pair
    which = "of the model" if of_model else "of a layer"
    apart = [names for names in sets if len({schemes[name] for name in names}) > 1]
    layer = _experts_of_layer(first)
    pattern = "*.experts.*" if of_model else f"{layer if len(apart) == 1 else starred(layer)}.*"
    linears = [name for names in apart for name in names]
    if any(schemes[name] is None for name in linears):
        return (
            f"{_beside(first, second, schemes)}: all experts {which} need one scheme, so quantize all of them, or "
            f"none, --exclude '{pattern}'"
        )
    scheme = _largest(linears, schemes)
    return (
        f"{_beside(first, second, schemes)}: all experts {which} need one scheme, --scheme-for '{pattern}={scheme}', "
        f"or none, --exclude '{pattern}'"
    )


def any_apart(schemes: Schemes) -> str | None:
    """Name two quantized linears with different schemes; None if there are no such two."""
    pair = _first_pair([[name for name, scheme in schemes.items() if scheme is not None]], schemes)
    if pair is None:
        return None
    remedy = "all linears need one scheme there, without --scheme-for and --allocation"
    return f"{_beside(pair[1], pair[2], schemes)}: {remedy}"


def _sets(linears: Iterable[str], key: Callable[[str], str]) -> dict[str, list[str]]:
    """Gather linears that have the same key."""
    sets: dict[str, list[str]] = {}
    for name in linears:
        sets.setdefault(key(name), []).append(name)
    return sets


def _experts_of_layer(linear: str) -> str:
    """The name of the module that holds an expert and the others of its layer."""
    parts = linear.split(".")
    return ".".join(parts[: parts.index("experts") + 1])


def _first_pair(sets: Iterable[Sequence[str]], schemes: Schemes) -> tuple[Sequence[str], str, str] | None:
    """Find the first set in which schemes differ, and two linears of it."""
    for linears in sets:
        for second in linears[1:]:
            if schemes[second] != schemes[linears[0]]:
                return linears, linears[0], second
    return None


def _beside(first: str, second: str, schemes: Schemes) -> str:
    parent, _, leaf = second.rpartition(".")
    short = leaf if parent == first.rpartition(".")[0] else second
    return f"{first} {_at(schemes[first])} beside {short} {_at(schemes[second])}"


def _at(scheme: Scheme | None) -> str:
    return "in full precision" if scheme is None else f"at {scheme}"


def _largest(linears: Iterable[str], schemes: Schemes) -> Scheme:
    """The scheme with most bits among those of quantized linears, the first of equals."""
    return max((s for name in linears if (s := schemes[name]) is not None), key=lambda scheme: scheme.weight.bits)


def _one_scheme(linears: Sequence[str], sets: Sequence[Sequence[str]], schemes: Schemes) -> str:
    """Say how linears get one scheme: in all blocks at once if all blocks mix in the same way."""
    peers = [names for names in sets if list(map(starred, names)) == list(map(starred, linears))]
    mixed = [schemes[name] for name in linears]
    everywhere = len(peers) > 1 and all([schemes[name] for name in names] == mixed for names in peers)
    pattern = starred if everywhere else str
    if None in mixed:
        quantized = ",".join(pattern(name) for name in linears if schemes[name] is not None)
        return f"leave all of them in full precision, --exclude '{quantized}', or none"
    scheme = _largest(linears, schemes)
    options = [f"--scheme-for '{pattern(name)}={scheme}'" for name in linears if schemes[name] != scheme]
    return f"give them one scheme, {' '.join(options)}"
