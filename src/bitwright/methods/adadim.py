"""AdaDim: Rethinking Channel Dimensions to Isolate Outliers for Low-bit Weight Quantization of LLMs (arXiv 2309.15531).

Outliers of activations are in single input channels. If the weights of one input channel share a scale along the output
(per-IC, tiles (g, 1)), an outlier's effect stays inside their group. If weights share a scale along the input (per-OC,
tiles (1, g)), the effect spreads. Which is better differs from linear to linear:

    dim* = argmin over {oc, ic} of || F_dim(X) - F(X) ||^2        Fdim: weights rounded to nearest along dim

F is the module that encloses the linear: attention for q, k, v; the MLP for gate, up; the linear itself for o and down.
``axis`` "oc" or "ic" takes one axis for all linears. With ``gptq`` after it, this is the paper's GPTQ-ada.

Where we differ: the error is that of a whole group of linears against full precision, with the choices already made in
it. The result is compared with per-OC for all and per-IC for all, so it is never worse than either. Inputs are those of
the quantized stream. A linear whose output does not divide into groups stays per-OC, and the report says so.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch

from bitwright.core.block import Block, LinearGroup
from bitwright.core.decisions import BlockDecisions, Decision
from bitwright.core.errors import SchemeError
from bitwright.core.grid import Tile
from bitwright.core.method import BlockData, Closed, Context, Freedom
from bitwright.core.scheme import Scheme
from bitwright.methods._shared_settings import Axis
from bitwright.steps.apply import parameters_of
from bitwright.steps.trial import TOKENS, rounded

Choice = dict[str, Tile]


@dataclass(frozen=True)
class AdaDimSettings(Axis):
    """The setting ``axis``, of which None stands for ``auto``."""


def freedom(scheme: Scheme, settings: AdaDimSettings) -> Freedom:
    """Per-IC tiles, unless ``axis`` is oc. Raises SchemeError if the scheme fixes the axis already."""
    if scheme.fixes_axis:
        raise SchemeError(
            f"scheme {scheme} fixes the axis that adadim is to choose; take W4A16g128, or leave adadim out"
        )
    return Freedom(() if settings.axis == "oc" else (scheme.tile.transposed,), compared=settings.axis != "ic")


@torch.no_grad()
def decide(block: Block, context: Context[AdaDimSettings], decisions: BlockDecisions) -> BlockDecisions:
    """Decide a tile for every linear; without calibration data (the output layer) it is the scheme's."""
    if context.data is None:
        return decisions
    for group in block.topology.groups:
        able = [name for name in group.linears if _divides(block, name, context.scheme(name))]
        unable = [f"{n}: its output does not divide into groups, stays per-OC" for n in group.linears if n not in able]
        decisions = replace(decisions, fallbacks=(*decisions.fallbacks, *unable))
        if context.settings.axis in (None, "auto") and able:
            chosen = _choose(block, group, able, context, context.data, decisions)
        else:
            chosen = _per_ic(able if context.settings.axis == "ic" else (), context)
        decisions = _with_tiles(decisions, chosen)
    return decisions


def _choose(
    block: Block,
    group: LinearGroup,
    able: list[str],
    context: Context[AdaDimSettings],
    data: BlockData,
    decisions: BlockDecisions,
) -> Choice:
    """Choose an axis for one linear after another, then take the best of this choice and of one axis for all."""
    module = data.inspect(group.linears, group.enclosing, decisions, TOKENS)
    parameters = parameters_of(block, decisions)

    def error(per_ic: frozenset[str], linears: tuple[str, ...]) -> float:
        tried = _with_tiles(decisions, _per_ic(per_ic, context))
        return module.error(rounded(parameters, linears, context, tried))

    chosen = frozenset[str]()
    for n, name in enumerate(group.linears):
        upto = group.linears[: n + 1]
        if name in able and error(chosen | {name}, upto) < error(chosen, upto):
            chosen |= {name}
    candidates: list[frozenset[str]] = [frozenset(), chosen, frozenset(able)]
    errors = [error(candidate, group.linears) for candidate in candidates]
    return _per_ic(candidates[errors.index(min(errors))], context)


def _per_ic(linears: Collection[str], context: Context[AdaDimSettings]) -> Choice:
    return {name: context.scheme(name).tile.transposed for name in linears}


def _with_tiles(decisions: BlockDecisions, chosen: Choice) -> BlockDecisions:
    return decisions.with_linears({name: replace(decisions.linear(name), tile=tile) for name, tile in chosen.items()})


def _divides(block: Block, name: str, scheme: Scheme) -> bool:
    rows, columns = block.weight(name).shape
    return scheme.tile.transposed.divides((rows, columns))


METHOD = Closed(
    summary="choose for each linear whether its groups go along the input or the output",
    settings=AdaDimSettings,
    decides=frozenset({Decision.AXIS}),
    decide=decide,
    freedom=freedom,
    needs_text=True,
)
