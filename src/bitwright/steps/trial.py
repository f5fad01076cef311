"""The error of the output with a site's transform, if the weights behind the site are rounded to nearest.

AWQ (arXiv 2306.00978, eq. 4) and Outlier Suppression+ (arXiv 2304.09145) choose by this objective:

    || F(Q(W s), Q((x - delta) / s)) - F(W, x) ||^2        F the module that encloses the linears behind the site
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bitwright.core.block import Block, LinearGroup, Site
from bitwright.core.decisions import BlockDecisions, LinearDecision, SiteDecision
from bitwright.core.method import BlockData, Context
from bitwright.steps.apply import parameters_of, quantize_linear
from bitwright.steps.transform import apply_site, spread

TOKENS = 2**13
"""The largest number of tokens that candidates are judged on.

Four times as many changed nothing for AdaDim, and brought AWQ to a KL divergence of 0.0785 instead of 0.0789 (en-llama,
W2A16g128).
"""


class Trial:
    """A site and the module that encloses the linears behind it, ready to be run."""

    def __init__(
        self, block: Block, site: Site, context: Context[Any], data: BlockData, decisions: BlockDecisions
    ) -> None:
        """``decisions`` are the block's decisions so far."""
        self.site, self.context, self.decisions = site, context, decisions
        self.parameters = parameters_of(block, decisions)
        groups = _behind(block, site)
        linears = tuple(name for group in groups for name in group.linears)
        enclosing = groups[0].enclosing if len(groups) == 1 else ""
        self.module = data.inspect(linears, enclosing, decisions, TOKENS)

    @torch.no_grad()
    def error(self, scale: Float[Tensor, " C"], shift: Float[Tensor, " C"] | None = None) -> float:
        """The mean squared error of the module's output with this scale and shift."""
        moved = apply_site(self.parameters, self.site, scale, shift)
        behind = rounded(moved, [side.module for side in self.site.readers], self.context, self.decisions)
        reader = self.site.consumers[0]  # linears that share an input share its channels
        return self.module.error(behind, spread(scale, reader), None if shift is None else spread(shift, reader))


def rounded(
    parameters: Mapping[str, Tensor], linears: Sequence[str], context: Context[Any], decisions: BlockDecisions
) -> dict[str, Tensor]:
    """The weights and biases of these linears; weights to be quantized are rounded to nearest in min-max ranges."""
    replaced = {}
    for name in linears:
        weight, scheme = parameters[f"{name}.weight"], context.allocation.of(name)
        if scheme is not None:
            decision = LinearDecision(tile=decisions.tile(name, scheme))
            weight = quantize_linear(weight, decision, scheme, context.scale_dtype).dequantize()
        replaced[f"{name}.weight"] = weight
        if f"{name}.bias" in parameters:
            replaced[f"{name}.bias"] = parameters[f"{name}.bias"]
    return replaced


def best(trial: Trial, candidates: list[SiteDecision]) -> SiteDecision:
    """The candidate with the least error, the first of equals; one that is not finite never replaces the first."""
    errors = [trial.error(candidate.scale, candidate.shift) for candidate in candidates]
    return candidates[min(range(len(errors)), key=lambda n: (not errors[n] < float("inf"), errors[n]))]


def _behind(block: Block, site: Site) -> list[LinearGroup]:
    """The groups of linears that read a site's channels."""
    consumers = {side.module for side in site.consumers}
    return [group for group in block.topology.groups if consumers & {*group.linears}]
