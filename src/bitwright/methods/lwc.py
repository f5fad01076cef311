"""Learnable weight clipping, of OmniQuant: Omnidirectionally Calibrated Quantization for LLMs (arXiv 2308.13137).

Eq. 2, for each tile of a weight W at N bits, with gamma = sigmoid(a), beta = sigmoid(b):

    h = (gamma max(W) - beta min(W)) / (2^N - 1),   z = -round(beta min(W) / h)
    W_q = clamp(round(W / h) + z, 0, 2^N - 1)

gamma and beta are relative strengths: they keep their meaning while LET changes W, where PACT and LSQ, which learn
the threshold and the step themselves, do not follow.

a and b start at 4: gamma = beta = 0.982.

After training each range is searched once more, from where it was learned, on the error of its linear's output
(``steps/range_search.py``), and kept where the block's error falls: ``refine``, which is not in the paper.

Where we differ besides: the gradient also passes through the rounding of the zero point, so that a clipped weight
pulls on its own end of the range alone; and h is rounded to the dtype it is stored in while training, as it will be
written.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from bitwright.core.block import Block
from bitwright.core.decisions import BlockDecisions, Decision
from bitwright.core.method import Context, Learnable, Learned, Moments, Parameters, Range
from bitwright.core.scheme import Tile
from bitwright.steps.range_search import search
from bitwright.steps.ranges import minmax

START = 4.0


class Clipping(Learnable):
    """a and b of every tile of every linear; gamma and beta are their sigmoids."""

    def __init__(self, block: Block, context: Context, decisions: BlockDecisions) -> None:
        """Starts at sigmoid(4)."""
        self.context = context
        self.tiles = {n: decisions.tile(n, context.scheme) for n in block.topology.linears}
        start = {n: torch.full_like(minmax(block.weight(n), tile)[0], START) for n, tile in self.tiles.items()}
        self.a = {n: value.clone().requires_grad_() for n, value in start.items()}
        self.b = {n: value.clone().requires_grad_() for n, value in start.items()}
        self._seen: dict[str, tuple[Tensor, Range]] = {}
        rate = context.settings.lwc_lr
        super().__init__({"lwc.a": (self.a, rate), "lwc.b": (self.b, rate)})

    def range(self, linear: str, weight: Float[Tensor, "O I"], tile: Tile) -> Range:
        """low = beta min(W), high = gamma max(W)."""
        # A weight that nothing transforms is the same tensor in every step.
        if linear not in self._seen or self._seen[linear][0] is not weight:
            self._seen[linear] = (weight, minmax(weight, tile))
        low, high = self._seen[linear][1]
        return self.b[linear].sigmoid() * low, self.a[linear].sigmoid() * high

    @torch.no_grad()
    def refine(self, linear: str, weight: Float[Tensor, "O I"], moments: Moments) -> None:
        """gamma and beta by coordinate descent."""
        a, b, tile = self.a[linear], self.b[linear], self.tiles[linear]
        start = b.sigmoid(), a.sigmoid()
        beta, gamma = search(weight, start, self.context.scheme.weight, tile, self.context.scale_dtype, moments)
        a.copy_(gamma.logit())
        b.copy_(beta.logit())

    def decide(self, parameters: Parameters, decisions: BlockDecisions) -> BlockDecisions:
        """The ranges on the transformed weights."""
        decided = {}
        for name, tile in self.tiles.items():
            low, high = minmax(parameters[f"{name}.weight"], tile)
            low, high = self.b[name].detach().sigmoid() * low, self.a[name].detach().sigmoid() * high
            decided[name] = replace(decisions.linear(name), low=low, high=high)
        return decisions.with_linears(decided)


METHOD = Learned(
    decides=frozenset({Decision.RANGE}), learn=Clipping, uses=frozenset({"lwc_lr", "refine", "drift"}), refines=True
)
