"""Outlier Suppression+: Accurate Quantization of Large Language Models (arXiv 2304.09145), by shifting and scaling.

The shift of channel j:     z_j = (max X_j + min X_j) / 2
Its scale, of one threshold t for all:   s_j = max(1, max|X_j - z_j| / t)

so only channels that reach past t are scaled. The threshold is searched, on the output of the linears behind the site
with weights and activations quantized. Sites of the paper: norm->q,k,v and norm->gate,up (fc1), with the shift
where the norm has a bias to absorb it; ``sites="all"`` takes every site with linears behind it, among them up->down,
which the authors' code scales for LLaMA.

Where we differ: thresholds fall geometrically, since outliers are factors, not distances, from the largest magnitude
(no channel is scaled) down to the smallest channel's (all are); the output is the enclosing module's; each site is
searched with those before it applied, on the quantized stream, over 8,192 tokens instead of one batch.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bitwright.core.block import Block, Site
from bitwright.core.decisions import BlockDecisions, Decision, SiteDecision
from bitwright.core.method import Closed, Context
from bitwright.steps.migration import LARGEST, SMALLEST, behind_norms, centred, of_inputs, scalable
from bitwright.steps.trial import Trial, best

THRESHOLDS, FURTHEST = 40, 1e-3


def decide(block: Block, context: Context, decisions: BlockDecisions) -> BlockDecisions:
    """Shift and scale site by site; nothing where there are no inputs to see (the output layer)."""
    if context.inspect is None:
        return decisions
    for site in scalable(block) if context.settings.sites == "all" else behind_norms(block):
        candidates = _candidates(block, site, context)
        trial = Trial(block, site, context, decisions)
        decisions = decisions.with_sites({site.name: best(trial, candidates)})
    return decisions


def _candidates(block: Block, site: Site, context: Context) -> list[SiteDecision]:
    """The shift with the scale of each threshold, without any scale first."""
    place = next(block.module.parameters()).device
    shift = centred(site, context.stats)
    reach = _reach(site, context, shift).to(place)
    shift = None if shift is None else shift.to(place)
    most = float(reach.max())
    least = max(float(reach.min()), FURTHEST * most, SMALLEST)
    falling = torch.logspace(0, 1, THRESHOLDS, base=least / max(most, least)).tolist()
    return [SiteDecision((reach / (most * t)).clamp(1, LARGEST).nan_to_num(1.0), shift) for t in falling]


def _reach(site: Site, context: Context, shift: Float[Tensor, " C"] | None) -> Float[Tensor, " C"]:
    """max|X_j - z_j| of every free channel."""
    if shift is None:
        return of_inputs(site, context.stats, lambda found: found.absmax)
    high = of_inputs(site, context.stats, lambda found: found.max) - shift
    low = of_inputs(site, context.stats, lambda found: -found.min) + shift
    return torch.maximum(high, low)


METHOD = Closed(
    decides=frozenset({Decision.TRANSFORM}), decide=decide, needs_text=True, reads_stats=True, uses=frozenset({"sites"})
)
