"""Learnable equivalent transformation, of OmniQuant (arXiv 2308.13137).

Eq. 3, a linear:      Y = [(X - delta) / s] [s W] + [B + delta W]
Eq. 5, attention:     P = softmax((Q / s_a)(s_a K^T))

Scale s and shift delta of each site are learned; they are folded into the norm or linear before, and into the weights
after (``steps/transform.py``). They start at SmoothQuant's s = max|X|^alpha / max|W|^(1 - alpha) and Outlier
Suppression+'s delta = (max X + min X) / 2; s_a starts at 1. Sites of the paper: norm->q,k,v; v->o; norm->fc1 (gate,
up); q.k. ``sites="all"`` adds up->down (fc1->fc2) of the MLP, if that is exact.

Where we differ: the logarithm of s is learned, so that steps are relative and s stays positive. Channels that must
share a scale (rotary pairs, query heads of one key-value head) share it; the authors' code refuses such models, or is
no equivalence there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bitwright.core.block import Block, Site, Topology
from bitwright.core.decisions import BlockDecisions, Decision, SiteDecision
from bitwright.core.method import Context, Learnable, Learned, Parameters, Unneeded
from bitwright.core.scheme import Scheme
from bitwright.core.settings import setting
from bitwright.methods._shared_settings import RATE, Migration, Sites
from bitwright.steps.migration import LARGEST, SMALLEST, balanced, centred, measured
from bitwright.steps.transform import apply_site


@dataclass(frozen=True)
class LETSettings(Migration, Sites):
    """The settings of LET; ``alpha`` decides the start of the scales."""

    let_lr: float = setting(5e-3, "learning rate of scales and shifts", above=0, wants=RATE)


class Transformation(Learnable):
    """The parameters log s of every chosen site, and delta if the site can absorb a shift."""

    def __init__(self, block: Block, context: Context[LETSettings], decisions: BlockDecisions) -> None:
        """Start at the closed forms."""
        self.sites = chosen(block.topology.sites, context.settings.sites)
        if context.data is not None:
            self.sites = tuple(measured(self.sites, context.data.stats)[0])
        place = block.device
        starts = {site.name: _start(block, site, context) for site in self.sites}
        starts = {
            n: (scale.to(place), None if shift is None else shift.to(place)) for n, (scale, shift) in starts.items()
        }
        self.log_scale = {name: scale.log().requires_grad_() for name, (scale, _) in starts.items()}
        self.shift = {name: shift.requires_grad_() for name, (_, shift) in starts.items() if shift is not None}
        rate = context.settings.let_lr
        super().__init__({"let.log_scale": (self.log_scale, rate), "let.shift": (self.shift, rate)})

    def transform(self, parameters: Parameters) -> Parameters:
        """Apply scale and shift of all sites, one after another."""
        for site in self.sites:
            parameters = apply_site(parameters, site, self.scale(site.name), self.shift.get(site.name))
        return parameters

    def scale(self, site: str) -> Float[Tensor, " C"]:
        """The scale s of a site, kept in [1e-5, 1e4]."""
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


def _start(
    block: Block, site: Site, context: Context[LETSettings]
) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"] | None]:
    """Scale and shift at the start: in closed form, or 1 and None if no linears are behind the site."""
    if not site.consumers or context.data is None:
        return torch.ones(site.channels), None
    return balanced(site, block, context.data.stats, context.settings.alpha), centred(site, context.data.stats)


def unneeded(scheme: Scheme, topology: Topology, asked: Mapping[str, Any]) -> Unneeded | None:
    """The reason to leave LET out: 16-bit activations, and no site that can absorb a shift (RMSNorm architectures).

    OmniQuant's authors leave it out there too. A recipe that sets ``sites`` keeps it.
    """
    quantizes_activations = scheme.activations is not None or scheme.kv is not None
    if asked.get("sites") is not None or quantizes_activations or any(site.shift for site in topology.sites):
        return None
    return Unneeded(
        "16-bit activations do not need it, and no site of this architecture can absorb a shift",
        "name --sites to keep it, which pays where channels are outliers",
        instead="lwc",
    )


def shape(settings: LETSettings) -> str:
    """The setting on which the number of parameters depends: the sites."""
    return settings.sites


METHOD = Learned(
    summary="learn scales and shifts between linears (OmniQuant)",
    settings=LETSettings,
    decides=frozenset({Decision.TRANSFORM}),
    learn=Transformation,
    unneeded=unneeded,
    shape=shape,
)
