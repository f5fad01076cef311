"""Data-Free Quantization Through Weight Equalization and Bias Correction (arXiv 1906.04721): the equalization.

Eq. 11, between two linears:    s_j = sqrt(r1_j r2_j) / r2_j,    W1 / s, s W2

with r1 the range of W1's rows and r2 the range of W2's columns. The outlier channels of large models are produced by
large weights and read by small ones. The small ones round to zero beside the others in their grid; s makes both sides
equally large.

Where we differ: sizes are norms, which do not depend on one weight. The gain of a norm counts as a row. Only channels
whose s is at least four times more or less than the median get one, a power of two: if no channel stands out,
equalizing all of them costs more than it gains (docs/methods/equalize.md).
"""

from bitwright.core.block import Block
from bitwright.core.decisions import BlockDecisions, Decision, SiteDecision
from bitwright.core.method import Closed, Context
from bitwright.core.settings import Settings
from bitwright.steps.migration import equalized, scalable

LEAST = 4.0


def decide(block: Block, context: Context[Settings], decisions: BlockDecisions) -> BlockDecisions:
    """Decide scales for every site that has linears behind it and a channel that stands out."""
    place = block.device
    scales = {site.name: equalized(site, block, LEAST) for site in scalable(block)}
    return decisions.with_sites({n: SiteDecision(s.to(place)) for n, s in scales.items() if bool((s != 1).any())})


METHOD = Closed(
    summary="make the two sides of outlier channels equally large, without calibration data",
    settings=Settings,
    decides=frozenset({Decision.TRANSFORM}),
    decide=decide,
)
