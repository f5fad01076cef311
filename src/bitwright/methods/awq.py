"""AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration (arXiv 2306.00978).

Eq. 4 and 5: weights that read large inputs matter most. A scale per input channel protects them:

    s = s_X^a,   s_X = mean|X_j|,   a* = argmin over a grid of [0, 1] of || Q(W diag(s)) (diag(s)^-1 X) - W X ||

The error is that of the module that encloses the linears: attention for q,k,v; the MLP for gate,up; the linear itself
for o and down. Then ranges are clipped: each tile's largest magnitude shrinks by up to a half, to the share that keeps
the tile's own part of the output nearest. q and k are not clipped, because attention multiplies their errors. Sites:
norm->q,k,v; v->o; norm->gate,up; up->down. These are all sites that have linears behind them.

Where we differ: s is normalised by sqrt(max s min s) as in the authors' code. Inputs are those of the quantized stream.
Sites are searched one after another, with the earlier ones applied. Heads that share a value head share its scale; the
authors' code leaves that site out. The clip search takes the tile's second moments over all tokens, not 512.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from bitwright.core.block import Block, Site
from bitwright.core.decisions import BlockDecisions, Decision, LinearDecision, SiteDecision
from bitwright.core.method import TOO_FEW, BlockData, Closed, Context
from bitwright.core.settings import Settings
from bitwright.steps.apply import weights_of
from bitwright.steps.migration import SMALLEST, measured, of_inputs, scalable
from bitwright.steps.range_search import shrunk
from bitwright.steps.trial import Trial, best

RATIOS = [n / 20 for n in range(20)]
SHARES = [1 - n / 20 for n in range(10)]


def decide(block: Block, context: Context[Settings], decisions: BlockDecisions) -> BlockDecisions:
    """Decide scales site by site, then ranges. Without calibration data (the output layer), decide nothing."""
    if context.data is None:
        return decisions
    sites, unmeasured = measured(scalable(block), context.data.stats)
    decisions = replace(decisions, fallbacks=(*decisions.fallbacks, *unmeasured))
    for site in sites:
        decisions = decisions.with_sites({site.name: _scale(block, site, context, context.data, decisions)})
    return _clip(block, context, context.data, decisions)


def _scale(
    block: Block, site: Site, context: Context[Settings], data: BlockData, decisions: BlockDecisions
) -> SiteDecision:
    means = of_inputs(site, data.stats, lambda channels: channels.absmean).to(block.device)
    candidates = [SiteDecision(_normalised(means.clamp(min=SMALLEST).pow(ratio))) for ratio in RATIOS]
    return best(Trial(block, site, context, data, decisions), candidates)


def _normalised(scale: Float[Tensor, " C"]) -> Float[Tensor, " C"]:
    return scale / (scale.max() * scale.min()).sqrt()


@torch.no_grad()
def _clip(block: Block, context: Context[Settings], data: BlockData, decisions: BlockDecisions) -> BlockDecisions:
    multiplied = {side.module for site in block.topology.sites if not site.consumers for side in site.producers}
    weights = weights_of(block, decisions)
    decided: dict[str, LinearDecision] = {}
    fallbacks = list[str]()
    for group in block.topology.groups:
        linears = [name for name in group.linears if name not in multiplied]
        if not linears:
            continue
        moments = data.moments(linears[0], decisions, drift=False)
        if group.routed and moments.tokens < TOO_FEW:
            fallbacks += [f"{name}: {moments.tokens} tokens reached it, its range stays min-max" for name in linears]
            continue
        for name in linears:
            scheme = context.scheme(name)
            tile = decisions.tile(name, scheme)
            low, high = shrunk(weights[name], SHARES, scheme.weight, tile, context.scale_dtype, moments.inputs)
            decided[name] = replace(decisions.linear(name), low=low, high=high)
    return replace(decisions, fallbacks=(*decisions.fallbacks, *fallbacks)).with_linears(decided)


METHOD = Closed(
    summary="protect weights that read large activations by scales, then clip ranges, both by a search on the output",
    settings=Settings,
    decides=frozenset({Decision.TRANSFORM, Decision.RANGE}),
    decide=decide,
    needs_text=True,
)
