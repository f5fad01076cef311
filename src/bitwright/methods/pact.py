"""PACT: Parameterized Clipping Activation (arXiv 1805.06085), its learned threshold on weights.

It is here for OmniQuant's ablation (arXiv 2308.13137, table A3): the two ends of each tile's range are learned
directly, as thresholds, and start at min-max. Unlike LWC's strengths they do not follow a weight that LET changes.

    low, high = theta_low low_0, theta_high high_0        (theta starts at 1)

Where we differ: the thresholds are learned in units of their starting value, so that one learning rate fits weights of
any magnitude.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from bitwright.core.block import Block
from bitwright.core.decisions import BlockDecisions, Decision
from bitwright.core.grid import Tile
from bitwright.core.method import Context, Learnable, Learned, Parameters, Range
from bitwright.methods._shared_settings import ClippingRate
from bitwright.steps.apply import weights_of
from bitwright.steps.ranges import minmax


@dataclass(frozen=True)
class PACTSettings(ClippingRate):
    """The setting ``lwc_lr``."""


class Thresholds(Learnable):
    """The parameters theta_low and theta_high of every tile of every linear."""

    def __init__(self, block: Block, context: Context[PACTSettings], decisions: BlockDecisions) -> None:
        """Start at the min-max of the weights as transformed so far."""
        weights = weights_of(block, decisions)
        self.ends = {n: minmax(w, decisions.tile(n, context.scheme(n))) for n, w in weights.items()}
        self.low = {name: torch.ones_like(low).requires_grad_() for name, (low, _) in self.ends.items()}
        self.high = {name: torch.ones_like(high).requires_grad_() for name, (_, high) in self.ends.items()}
        rate = context.settings.lwc_lr
        super().__init__({"pact.low": (self.low, rate), "pact.high": (self.high, rate)})

    def range(self, linear: str, weight: Float[Tensor, "O I"], tile: Tile) -> Range:
        """The range between the thresholds; it contains zero."""
        low, high = self.ends[linear]
        return self.low[linear].clamp(min=0) * low, self.high[linear].clamp(min=0) * high

    def decide(self, parameters: Parameters, decisions: BlockDecisions) -> BlockDecisions:
        """The ranges between the learned thresholds."""
        decided = {}
        for name, (low, high) in self.ends.items():
            factors = self.low[name].detach().clamp(min=0), self.high[name].detach().clamp(min=0)
            decided[name] = replace(decisions.linear(name), low=factors[0] * low, high=factors[1] * high)
        return decisions.with_linears(decided)


METHOD = Learned(
    summary="learn the two ends of each range as thresholds",
    settings=PACTSettings,
    decides=frozenset({Decision.RANGE}),
    learn=Thresholds,
)
