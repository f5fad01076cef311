"""EasyQuant: An Efficient Data-free Quantization Algorithm for LLMs (arXiv 2403.02775).

No text, no forward pass. Weights far from the mean, under 1 %, are kept exactly (``easyquant_outliers.py``); the others
get the range that loses least, each tile for itself:

    minimise || W - h clip(round(W / h)) ||^2 over h

Where we differ: the range is found by closed-form least squares from many starts, with a zero point where the scheme
has one, on any tile; and errors along a tile's own weights count more often than others (``alignment``,
``steps/range_fit.py``). ``range`` "paper" is the paper's own procedure. With ``axis`` "auto" a linear's groups go along
its output where that loses less.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from bitwright.core.decisions import Decision, LinearDecision
from bitwright.core.errors import SchemeError
from bitwright.core.grid import Tile
from bitwright.core.method import Context, DataFree, Range
from bitwright.core.scheme import Scheme
from bitwright.core.settings import Settings
from bitwright.methods.easyquant_outliers import decide as decide_outliers
from bitwright.steps.apply import quantize_linear
from bitwright.steps.range_fit import fitted
from bitwright.steps.range_gradient import by_gradient
from bitwright.steps.ranges import nearest_to_weights


@torch.no_grad()
def decide(weight: Float[Tensor, "O I"], context: Context, decided: LinearDecision) -> LinearDecision:
    """Outliers, tile and range of one linear."""
    decided = decide_outliers(weight, context, decided)
    tried = [_ranged(weight, context, replace(decided, tile=tile)) for tile in _possible(weight, context)]
    return min(tried, key=lambda one: _lost(weight, context, one)) if len(tried) > 1 else tried[0]


def tiles(scheme: Scheme, settings: Settings) -> tuple[Tile, ...]:
    """What may be chosen, or must, beside the scheme's own. Raises SchemeError where it fixes the axis already."""
    if settings.axis in (None, "oc"):
        return ()
    if scheme.fixes_axis:
        raise SchemeError(f"scheme {scheme} fixes the axis; take W4A16g128, or leave --axis {settings.axis} out")
    return (scheme.tile.transposed,)


def _possible(weight: Float[Tensor, "O I"], context: Context) -> list[Tile]:
    """The tiles to choose from; per-OC where the output does not divide into groups."""
    own, other = context.scheme.tile, tiles(context.scheme, context.settings)
    able = [tile for tile in other if tile.divides((weight.shape[0], weight.shape[1]))]
    return able if context.settings.axis == "ic" and able else [own, *able]


def _ranged(weight: Float[Tensor, "O I"], context: Context, decided: LinearDecision) -> LinearDecision:
    low, high = _range(decided.inside(weight), decided.tile or context.scheme.tile, context)
    return replace(decided, low=low, high=high)


def _range(weight: Float[Tensor, "O I"], tile: Tile, context: Context) -> Range:
    grid, dtype, settings = context.scheme.weight, context.scale_dtype, context.settings
    if settings.range == "paper":
        return by_gradient(weight, grid, tile, dtype)
    if settings.norm != 2:
        return nearest_to_weights(weight, grid, tile, dtype, norm=settings.norm)
    return fitted(weight, grid, tile, dtype, alignment=settings.alignment)


def _lost(weight: Float[Tensor, "O I"], context: Context, decided: LinearDecision) -> float:
    """|| W - W_q ||^2"""
    made = quantize_linear(weight, decided, context.scheme, context.scale_dtype).dequantize(torch.float32)
    return float(torch.linalg.vector_norm(weight - made).double() ** 2)


METHOD = DataFree(
    decides=frozenset({Decision.OUTLIERS, Decision.AXIS, Decision.RANGE}),
    decide=decide,
    uses=frozenset({"outliers", "range", "norm", "alignment", "axis"}),
    tiles=tiles,
)
