"""Round to nearest: every weight goes to the nearest code of its tile's range.

The range is min-max if no method chose another. This is the baseline of every paper here. With h and z of each tile as
in ``core/qtensor.py`` (OmniQuant, arXiv 2308.13137, eq. 2 at gamma = beta = 1):

    W_q = clamp(round(W / h) + z, 0, 2^N - 1)

``steps/apply.py`` does that by default, so this method decides nothing more.

Where we differ: the scale h is rounded to its stored dtype before z and the codes are computed, so that the written
model has exactly the weights that were rounded.
"""

from torch import Tensor

from bitwright.core.decisions import Decision, LinearDecision
from bitwright.core.method import DataFree, WeightContext
from bitwright.core.settings import Settings


def decide(weight: Tensor, context: WeightContext[Settings], decided: LinearDecision) -> LinearDecision:
    """Return the decisions unchanged: a linear without codes is rounded to nearest."""
    return decided


METHOD = DataFree(
    summary="round each weight to the nearest code",
    settings=Settings,
    decides=frozenset({Decision.ROUNDING}),
    decide=decide,
)
