"""Round to nearest: every weight goes to the nearest code of its tile's range, min-max where no method chose another.

The baseline that every paper here is measured against. With h and z of each tile as in ``core/qtensor.py``
(OmniQuant, arXiv 2308.13137, eq. 2 at gamma = beta = 1):

    W_q = clamp(round(W / h) + z, 0, 2^N - 1)

That is what ``steps/apply.py`` does with what nobody decided, so this method decides nothing more.

Where we differ: the scale h is rounded to the dtype it is stored in before z and the codes are computed, so
that the written model has exactly the weights that were rounded.
"""

from torch import Tensor

from bitwright.core.decisions import Decision, LinearDecision
from bitwright.core.method import Context, DataFree


def decide(weight: Tensor, context: Context, decided: LinearDecision) -> LinearDecision:
    """What is decided, as it is: no codes is rounding to nearest."""
    return decided


METHOD = DataFree(decides=frozenset({Decision.ROUNDING}), decide=decide)
