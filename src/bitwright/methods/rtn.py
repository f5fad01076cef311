"""Round to nearest: every tile's range is the min-max of its weights, every weight goes to the nearest code.

The baseline that every paper here is measured against. With h and z of each tile as in ``core/qtensor.py``
(OmniQuant, arXiv 2308.13137, eq. 2 at gamma = beta = 1):

    W_q = clamp(round(W / h) + z, 0, 2^N - 1)

Where we differ: the scale h is rounded to the dtype it is stored in before z and the codes are computed, so
that the written model has exactly the weights that were rounded.
"""

from dataclasses import replace

from bitwright.core.block import Block
from bitwright.core.decisions import BlockDecisions, Decision
from bitwright.core.method import Closed, Context
from bitwright.steps.ranges import minmax


def decide(block: Block, context: Context, decisions: BlockDecisions) -> BlockDecisions:
    """Min-max ranges for every linear; rounding to nearest is what ``steps`` does with no codes decided."""
    decided = {}
    for name in block.topology.linears:
        so_far = decisions.linear(name)
        low, high = minmax(block.weight(name), so_far.tile or context.scheme.tile)
        decided[name] = replace(so_far, low=low, high=high)
    return decisions.with_linears(decided)


METHOD = Closed(decides=frozenset({Decision.RANGE, Decision.ROUNDING}), decide=decide)
