"""EasyQuant: An Efficient Data-free Quantization Algorithm for LLMs (arXiv 2403.02775).

It needs no calibration data and no forward pass. Weights far from the mean, under 1 %, are kept exactly
(``easyquant_outliers.py``). Every tile of the others gets the range that loses least:

    minimise || W - h clip(round(W / h)) ||^2 over h

Where we differ: the range is found by closed-form least squares from many starts, with a zero point if the scheme has
one, on any tile. Errors along a tile's own weights count more than others (``alignment``, ``steps/range_fit.py``).
``range`` "paper" is the paper's own procedure. With ``axis`` "auto", a linear's groups go along its output if that
loses less.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from bitwright.core.decisions import Decision, LinearDecision
from bitwright.core.errors import RecipeError, SchemeError
from bitwright.core.grid import Tile
from bitwright.core.method import DataFree, Freedom, Range, WeightContext
from bitwright.core.outlier_rule import OutlierRule
from bitwright.core.scheme import Scheme
from bitwright.core.settings import Depends, setting
from bitwright.methods._shared_settings import Axis
from bitwright.methods.easyquant_outliers import OutlierSettings
from bitwright.steps.apply import quantize_linear
from bitwright.steps.outliers import outliers
from bitwright.steps.range_fit import alignment_at, fitted
from bitwright.steps.range_gradient import by_gradient
from bitwright.steps.ranges import nearest_to_weights

SMALLEST_NORM, LARGEST_NORM = 0.5, 4.0


@dataclass(frozen=True)
class EasyQuantSettings(OutlierSettings, Axis):
    """The settings of EasyQuant; ``axis`` None is the scheme's axis.

    ``range`` is "fitted" (least squares) or "paper" (gradient descent, for symmetric schemes). If ``norm``, p, is not
    2, ranges are searched for the least sum of |error|^p instead.
    """

    range: str = setting(
        "fitted",
        "how ranges are found: fitted (least squares), or paper (gradient descent, symmetric schemes only)",
        choices=("fitted", "paper"),
        paper=Depends(
            "paper if the scheme is symmetric", lambda basis: "paper" if basis.scheme.weight.symmetric else "fitted"
        ),
    )
    norm: float = setting(
        2.0,
        "p of the sum of |error|^p that ranges minimise",
        least=SMALLEST_NORM,
        most=LARGEST_NORM,
        wants=f"it is between {SMALLEST_NORM} and {LARGEST_NORM}",
    )
    alignment: float = setting(
        0.0,
        "how much more an error along its tile's own weights counts",
        least=0,
        wants="it is 0 or more, such as 16",
        bitwright=Depends("64, 16 at 2 and 3 bits", lambda basis: alignment_at(basis.scheme.weight.bits)),
    )

    def refuse(self, scheme: Scheme, asked: Collection[str]) -> None:
        """Refuse the paper's range for asymmetric weights, and settings that another setting leaves without effect."""
        if "range" in asked and self.range == "paper" and not scheme.weight.symmetric:
            raise RecipeError(
                f"range paper is symmetric and scheme {scheme} is not; add sym to its weights, or leave it out"
            )
        for other, keys in self._without_effect().items():
            for key in keys:
                if key in asked:
                    raise RecipeError(f"{key} changes nothing beside {other}; leave one of them out")

    def _without_effect(self) -> Mapping[str, tuple[str, ...]]:
        """The settings that change nothing, by the setting that is the reason."""
        if self.range == "paper":
            return {"range paper": ("norm", "alignment")}
        return {f"norm {self.norm:g}": ("alignment",)} if self.norm != 2 else {}


def freedom(scheme: Scheme, settings: EasyQuantSettings) -> Freedom:
    """Outliers, and tiles along the output if ``axis`` allows them. Raises SchemeError if the scheme fixes the axis."""
    rule = OutlierRule.parse(settings.outliers)
    if settings.axis in (None, "oc"):
        return Freedom(outliers=rule)
    if scheme.fixes_axis:
        raise SchemeError(f"scheme {scheme} fixes the axis; take W4A16g128, or leave --axis {settings.axis} out")
    return Freedom((scheme.tile.transposed,), compared=settings.axis == "auto", outliers=rule)


@torch.no_grad()
def decide(
    weight: Float[Tensor, "O I"], context: WeightContext[EasyQuantSettings], decided: LinearDecision
) -> LinearDecision:
    """Decide outliers, tile and range of one linear."""
    if context.outliers is not None:
        decided = replace(decided, outliers=outliers(weight, context.outliers))
    tried = [_ranged(weight, context, replace(decided, tile=tile)) for tile in _possible(weight, context)]
    return min(tried, key=lambda decision: _lost(weight, context, decision)) if len(tried) > 1 else tried[0]


def _possible(weight: Float[Tensor, "O I"], context: WeightContext[EasyQuantSettings]) -> list[Tile]:
    """The tiles to choose from; only the scheme's if the output does not divide into groups."""
    able = [tile for tile in context.tiles if tile.divides((weight.shape[0], weight.shape[1]))]
    return able if context.settings.axis == "ic" and able else [context.scheme.tile, *able]


def _ranged(
    weight: Float[Tensor, "O I"], context: WeightContext[EasyQuantSettings], decided: LinearDecision
) -> LinearDecision:
    low, high = _range(decided.inside(weight), decided.tile or context.scheme.tile, context)
    return replace(decided, low=low, high=high)


def _range(weight: Float[Tensor, "O I"], tile: Tile, context: WeightContext[EasyQuantSettings]) -> Range:
    grid, dtype, settings = context.scheme.weight, context.scale_dtype, context.settings
    if settings.range == "paper":
        return by_gradient(weight, grid, tile, dtype)
    if settings.norm != 2:
        return nearest_to_weights(weight, grid, tile, dtype, norm=settings.norm)
    return fitted(weight, grid, tile, dtype, alignment=settings.alignment)


def _lost(weight: Float[Tensor, "O I"], context: WeightContext[EasyQuantSettings], decided: LinearDecision) -> float:
    """The squared error || W - W_q ||^2."""
    dequantized = quantize_linear(weight, decided, context.scheme, context.scale_dtype).dequantize(torch.float32)
    return float(torch.linalg.vector_norm(weight - dequantized).double() ** 2)


METHOD = DataFree(
    summary="keep outliers exactly and fit each range to the other weights",
    settings=EasyQuantSettings,
    decides=frozenset({Decision.OUTLIERS, Decision.AXIS, Decision.RANGE}),
    decide=decide,
    freedom=freedom,
)
