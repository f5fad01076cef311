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

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from bitwright.core.block import Block, Site
from bitwright.core.decisions import BlockDecisions, Decision, SiteDecision
from bitwright.core.method import Context, Learnable, Learned, LinearStats, Parameters
from bitwright.steps.transform import apply_site

SMALLEST, LARGEST = 1e-5, 1e4


class Transformation(Learnable):
    """log s, and delta where it can be absorbed, of every chosen site."""

    def __init__(self, block: Block, context: Context, decisions: BlockDecisions) -> None:
        """Starts at the closed forms."""
        self.sites = chosen(block.topology.sites, context.training.sites)
        place = next(block.module.parameters()).device
        starts = {site.name: _start(block, site, context) for site in self.sites}
        starts = {
            n: (scale.to(place), None if shift is None else shift.to(place)) for n, (scale, shift) in starts.items()
        }
        self.log_scale = {name: scale.log().requires_grad_() for name, (scale, _) in starts.items()}
        self.shift = {name: shift.requires_grad_() for name, (_, shift) in starts.items() if shift is not None}
        rate = context.training.let_lr
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
        return replace(decisions, sites={**decisions.sites, **decided})


def chosen(sites: tuple[Site, ...], which: str) -> tuple[Site, ...]:
    """The paper's sites, or all."""
    return tuple(site for site in sites if which == "all" or site.paper)


def _start(block: Block, site: Site, context: Context) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"] | None]:
    stats = [(side, context.stats[side.module]) for side in site.consumers if side.module in context.stats]
    if not stats:
        return torch.ones(site.channels), None
    x = _tied(site, [(side.index, s.absmax) for side, s in stats])
    w = _tied(site, [(side.index, block.weight(side.module).float().abs().amax(0)) for side, _ in stats])
    alpha = context.training.alpha
    scale = x.clamp(min=SMALLEST).pow(alpha) / w.clamp(min=SMALLEST).pow(1 - alpha)
    shift = _middle(site, stats[0][1], stats[0][0].index) if site.shift else None
    return scale.clamp(SMALLEST, LARGEST), shift


def _tied(site: Site, channels: list[tuple[tuple[int, ...] | None, Tensor]]) -> Float[Tensor, " C"]:
    """The largest value among the channels that share a parameter."""
    largest = torch.full((site.channels,), -torch.inf)
    for index, values in channels:
        where = torch.arange(site.channels) if index is None else torch.tensor(index)
        largest = largest.scatter_reduce(0, where, values.float().cpu(), "amax")
    return largest


def _middle(site: Site, stats: LinearStats, index: tuple[int, ...] | None) -> Float[Tensor, " C"]:
    return (_tied(site, [(index, stats.max)]) - _tied(site, [(index, -stats.min)])) / 2


METHOD = Learned(decides=frozenset({Decision.TRANSFORM}), learn=Transformation)
