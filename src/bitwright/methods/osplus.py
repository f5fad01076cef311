"""Outlier Suppression+: Accurate Quantization of Large Language Models (arXiv 2304.09145), by shifting and scaling.

The shift of channel j:                          z_j = (max X_j + min X_j) / 2
Its scale, with one threshold t for all j:       s_j = max(1, max|X_j - z_j| / t)

so only channels that reach past t are scaled. The threshold is searched on the output of the linears behind the site,
with weights and activations quantized. Sites of the paper: norm->q,k,v and norm->gate,up (fc1), with the shift if the
norm has a bias that can absorb it. ``sites="all"`` takes every site with linears behind it, among them up->down, which
the authors' code scales for LLaMA.

Where we differ: thresholds fall geometrically, because outliers differ by factors; they fall from the largest magnitude
(no channel is scaled) to the smallest channel's (all are scaled). The output is the enclosing module's. Each site is
searched with the earlier ones applied, on the quantized stream, over 8,192 tokens instead of one batch.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from bitwright.core.block import Block, Site
from bitwright.core.decisions import BlockDecisions, Decision, SiteDecision
from bitwright.core.method import Closed, Context
from bitwright.methods._shared_settings import Sites
from bitwright.steps.migration import LARGEST, SMALLEST, Stats, behind_norms, centred, measured, of_inputs, scalable
from bitwright.steps.trial import Trial, best

THRESHOLDS, FURTHEST = 40, 1e-3


@dataclass(frozen=True)
class OSPlusSettings(Sites):
    """The setting ``sites``."""


def decide(block: Block, context: Context[OSPlusSettings], decisions: BlockDecisions) -> BlockDecisions:
    """Decide shift and scale site by site. Without calibration data (the output layer), decide nothing."""
    if context.data is None:
        return decisions
    chosen = scalable(block) if context.settings.sites == "all" else behind_norms(block)
    sites, unmeasured = measured(chosen, context.data.stats)
    decisions = replace(decisions, fallbacks=(*decisions.fallbacks, *unmeasured))
    for site in sites:
        candidates = _candidates(block, site, context.data.stats)
        trial = Trial(block, site, context, context.data, decisions)
        decisions = decisions.with_sites({site.name: best(trial, candidates)})
    return decisions


def _candidates(block: Block, site: Site, stats: Stats) -> list[SiteDecision]:
    """The shift with the scale of each threshold; in the first candidate, all scales are 1."""
    place = block.device
    shift = centred(site, stats)
    reach = _reach(site, stats, shift).to(place)
    shift = None if shift is None else shift.to(place)
    most = float(reach.max())
    least = max(float(reach.min()), FURTHEST * most, SMALLEST)
    falling = torch.logspace(0, 1, THRESHOLDS, base=least / max(most, least)).tolist()
    return [SiteDecision((reach / (most * t)).clamp(1, LARGEST).nan_to_num(1.0), shift) for t in falling]


def _reach(site: Site, stats: Stats, shift: Float[Tensor, " C"] | None) -> Float[Tensor, " C"]:
    """The largest distance max|X_j - z_j| in every free channel."""
    if shift is None:
        return of_inputs(site, stats, lambda channels: channels.absmax)
    high = of_inputs(site, stats, lambda channels: channels.max) - shift
    low = of_inputs(site, stats, lambda channels: -channels.min) + shift
    return torch.maximum(high, low)


METHOD = Closed(
    summary="shift and scale activations, by a search on the output",
    settings=OSPlusSettings,
    decides=frozenset({Decision.TRANSFORM}),
    decide=decide,
    needs_text=True,
)
