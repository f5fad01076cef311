"""The outliers of EasyQuant (arXiv 2403.02775) alone, for another method to quantize what is left.

Weights with |W_ij - mean(W)| >= n std(W), n = 3, are kept exactly; section 3.1 finds under 1 % of them.
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
    """Which weights are kept exactly (``core/outlier_rule.py``)."""

    outliers: str = setting(
        "3",
        "weights kept exactly: 3 (standard deviations from the mean), 0.5% (the furthest), or 0",
        parse=OutlierRule.parse,
        number_as_text=True,
    )


def freedom(scheme: Scheme, settings: OutlierSettings) -> Freedom:
    """The outliers, unless there are to be none."""
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
