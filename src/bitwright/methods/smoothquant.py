"""SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models (arXiv 2211.10438).

Eq. 3, a linear:     Y = (X diag(s)^-1) (diag(s) W)
Eq. 4, its scale:    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)

Input channels that are hard to quantize are divided by s, which the norm before absorbs; the weights that read them are
multiplied by s. Sites of the paper: norm->q,k,v and norm->gate,up (fc1). ``sites="all"`` scales every site that has
linears behind it. ``alpha``, the migration strength, is 0.5; the authors take 0.8 to 0.9 for Llama 2 and 3.

Where we differ: channels that must share a scale (the query heads of one key-value head at v->o) share the largest of
their scales.
"""

from dataclasses import dataclass, replace

from bitwright.core.block import Block
from bitwright.core.decisions import BlockDecisions, Decision, SiteDecision
from bitwright.core.method import Closed, Context
from bitwright.methods._shared_settings import Migration, Sites
from bitwright.steps.migration import balanced, behind_norms, measured, scalable


@dataclass(frozen=True)
class SmoothQuantSettings(Migration, Sites):
    """The settings ``alpha`` and ``sites``."""


def decide(block: Block, context: Context[SmoothQuantSettings], decisions: BlockDecisions) -> BlockDecisions:
    """Decide scales for the chosen sites. Without calibration data (the output layer), decide nothing."""
    if context.data is None:
        return decisions
    stats, settings = context.data.stats, context.settings
    sites, unmeasured = measured(scalable(block) if settings.sites == "all" else behind_norms(block), stats)
    decisions = replace(decisions, fallbacks=(*decisions.fallbacks, *unmeasured))
    place = block.device
    scales = {site.name: balanced(site, block, stats, settings.alpha).to(place) for site in sites}
    return decisions.with_sites({name: SiteDecision(scale) for name, scale in scales.items()})


METHOD = Closed(
    summary="scale activations down and weights up, in closed form",
    settings=SmoothQuantSettings,
    decides=frozenset({Decision.TRANSFORM}),
    decide=decide,
    needs_text=True,
)
