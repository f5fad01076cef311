"""The outliers of EasyQuant (arXiv 2403.02775) alone, for another method to quantize what is left.

Weights with |W_ij - mean(W)| >= n std(W), n = 3, are kept exactly; section 3.1 finds under 1 % of them.
"""

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from bitwright.core.decisions import Decision, LinearDecision
from bitwright.core.method import Context, DataFree
from bitwright.core.panels import panels
from bitwright.steps.outliers import bounds, outliers


def decide(weight: Float[Tensor, "O I"], context: Context, decided: LinearDecision) -> LinearDecision:
    """The outliers of one linear; none with ``outliers`` 0."""
    rule = context.settings.outlier_rule
    if rule is None:
        return decided
    rows = panels((weight.shape[0], weight.shape[1]), context.scheme.tile)
    found = context.bounds or bounds(lambda: (weight[here] for here in rows), rule)
    return replace(decided, outliers=outliers(weight, found))


METHOD = DataFree(decides=frozenset({Decision.OUTLIERS}), decide=decide, uses=frozenset({"outliers"}))
