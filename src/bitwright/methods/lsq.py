"""LSQ: Learned Step Size Quantization (arXiv 1902.08153), on the weights of a trained model.

It is here for OmniQuant's ablation (arXiv 2308.13137, table A3): the step h of each tile is learned directly, and its
zero point z stays that of min-max.

    h = theta h_0        (theta starts at 1, h_0 is the min-max step)
    low, high = -z h, (2^N - 1 - z) h        (on a symmetric grid, the range whose step h is)

Where we differ: the step is learned in units of its starting value, which stands for the paper's gradient scale.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from bitwright.core.block import Block
from bitwright.core.decisions import BlockDecisions, Decision
from bitwright.core.grid import Tile
from bitwright.core.method import Context, Learnable, Learned, Parameters, Range
from bitwright.core.qtensor import affine, span
from bitwright.methods._shared_settings import ClippingRate
from bitwright.steps.apply import weights_of
from bitwright.steps.ranges import minmax

SMALLEST = 1e-3


@dataclass(frozen=True)
class LSQSettings(ClippingRate):
    """The setting ``lwc_lr``."""


class Steps(Learnable):
    """The parameter theta of every tile of every linear."""

    def __init__(self, block: Block, context: Context[LSQSettings], decisions: BlockDecisions) -> None:
        """Start at the min-max step of the weights as transformed so far."""
        self.ends = {}
        for name, weight in weights_of(block, decisions).items():
            scheme = context.scheme(name)
            low, high = minmax(weight, decisions.tile(name, scheme))
            self.ends[name] = span(*affine(low, high, scheme.weight, torch.float32), scheme.weight)
        self.theta = {name: torch.ones_like(low).requires_grad_() for name, (low, _) in self.ends.items()}
        super().__init__({"lsq.step": (self.theta, context.settings.lwc_lr)})

    def range(self, linear: str, weight: Float[Tensor, "O I"], tile: Tile) -> Range:
        """The range that the step spans."""
        low, high = self.ends[linear]
        theta = self.theta[linear].clamp(min=SMALLEST)
        return theta * low, theta * high

    def decide(self, parameters: Parameters, decisions: BlockDecisions) -> BlockDecisions:
        """The ranges of the learned steps."""
        decided = {}
        for name, (low, high) in self.ends.items():
            theta = self.theta[name].detach().clamp(min=SMALLEST)
            decided[name] = replace(decisions.linear(name), low=theta * low, high=theta * high)
        return decisions.with_linears(decided)


METHOD = Learned(
    summary="learn the step of each range",
    settings=LSQSettings,
    decides=frozenset({Decision.RANGE}),
    learn=Steps,
)
