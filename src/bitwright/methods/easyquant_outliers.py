"""The outliers of EasyQuant (arXiv 2403.02775) alone; another method quantizes the other weights.

Weights with |W_ij - mean(W)| >= n std(W), n = 3, are kept exactly. They are under 1 % (section 3.1).
"""

from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from bitwright.core.decisions import Decision, LinearDecision
from bitwright.core.method import DataFree, Freedom, WeightContext
from bitwright.core.outlier_rule import OutlierRule
from bitwright.core.scheme import Scheme
from bitwright.core.settings import Settings, setting
from bitwright.steps.outliers import outliers


@dataclass(frozen=True)
class OutlierSettings(Settings):
    """The rule for the weights that are kept exactly (``core/outlier_rule.py``)."""

    outliers: str = setting(
        "3",
        "weights kept exactly: 3 (those 3 standard deviations or more from the mean), 0.5% (the furthest 0.5%), or 0",
        parse=OutlierRule.parse,
        number_as_text=True,
    )


def freedom(scheme: Scheme, settings: OutlierSettings) -> Freedom:
    """Outliers, unless the settings ask for none."""
    return Freedom(outliers=OutlierRule.parse(settings.outliers))


def decide(
    weight: Float[Tensor, "O I"], context: WeightContext[OutlierSettings], decided: LinearDecision
) -> LinearDecision:
    """Decide the outliers of one linear."""
    if context.outliers is None:
        return decided
    return replace(decided, outliers=outliers(weight, context.outliers))


METHOD = DataFree(
    summary="keep the weights furthest from the mean exactly, for another method to quantize the rest",
    settings=OutlierSettings,
    decides=frozenset({Decision.OUTLIERS}),
    decide=decide,
    freedom=freedom,
)
