"""Learnable equivalent transformation, of OmniQuant (arXiv 2308.13137).

Eq. 3, a linear:      Y = [(X - delta) / s] [s W] + [B + delta W]
Eq. 5, attention:     P = softmax((Q / s_a)(s_a K^T))

Scale s and shift delta of each site are learned; they disappear into the norm or linear before, and into the weights
after (``steps/transform.py``). They start at SmoothQuant's s = max|X|^alpha / max|W|^(1 - alpha) and Outlier
Suppression+'s delta = (max X + min X) / 2; s_a at 1. Sites of the paper: norm->q,k,v; v->o; norm->fc1 (gate, up);
q.k. ``sites="all"`` adds the linear before the last one of the MLP, where that is exact.

Where we differ: the logarithm of s is learned, so that steps are relative and s stays positive; channels that must
share a scale (rotary pairs, query heads of one key-value head) do, where the authors' code gives up or is no
equivalence.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bitwright.core.block import Block, Site
from bitwright.core.decisions import BlockDecisions, Decision, SiteDecision
from bitwright.core.method import Context, Learnable, Learned, Parameters
from bitwright.steps.migration import LARGEST, SMALLEST, balanced, centred
from bitwright.steps.transform import apply_site


class Transformation(Learnable):
    """log s, and delta where it can be absorbed, of every chosen site."""

    def __init__(self, block: Block, context: Context, decisions: BlockDecisions) -> None:
        """Starts at the closed forms."""
        self.sites = chosen(block.topology.sites, context.settings.sites)
        place = next(block.module.parameters()).device
        starts = {site.name: _start(block, site, context) for site in self.sites}
        starts = {
            n: (scale.to(place), None if shift is None else shift.to(place)) for n, (scale, shift) in starts.items()
        }
        self.log_scale = {name: scale.log().requires_grad_() for name, (scale, _) in starts.items()}
        self.shift = {name: shift.requires_grad_() for name, (_, shift) in starts.items() if shift is not None}
        rate = context.settings.let_lr
        super().__init__({"let.log_scale": (self.log_scale, rate), "let.shift": (self.shift, rate)})

    def transform(self, parameters: Parameters) -> Parameters:
        """All sites moved in, one after the other."""
        for site in self.sites:
            parameters = apply_site(parameters, site, self.scale(site.name), self.shift.get(site.name))
        return parameters

    def scale(self, site: str) -> Float[Tensor, " C"]:
        """s, kept in [1e-5, 1e4]."""
        return self.log_scale[site].exp().clamp(SMALLEST, LARGEST)

    def decide(self, parameters: Parameters, decisions: BlockDecisions) -> BlockDecisions:
        """Scale and shift of each site."""
        decided = {}
        for site in self.sites:
            shift = self.shift.get(site.name)
            decided[site.name] = SiteDecision(self.scale(site.name).detach(), None if shift is None else shift.detach())
        return decisions.with_sites(decided)


def chosen(sites: tuple[Site, ...], which: str) -> tuple[Site, ...]:
    """The paper's sites, or all."""
    return tuple(site for site in sites if which == "all" or site.paper)


def _start(block: Block, site: Site, context: Context) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"] | None]:
    if not site.consumers or not context.stats:
        return torch.ones(site.channels), None
    return balanced(site, block, context.stats, context.settings.alpha), centred(site, context.stats)


METHOD = Learned(
    decides=frozenset({Decision.TRANSFORM}), learn=Transformation, uses=frozenset({"let_lr", "alpha", "sites"})
)
