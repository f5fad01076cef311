"""Learnable weight clipping, of OmniQuant: Omnidirectionally Calibrated Quantization for LLMs (arXiv 2308.13137).

Eq. 2, for each tile of a weight W at N bits, with gamma = sigmoid(a), beta = sigmoid(b):

    h = (gamma max(W) - beta min(W)) / (2^N - 1),   z = -round(beta min(W) / h)
    W_q = clamp(round(W / h) + z, 0, 2^N - 1)

gamma and beta are relative strengths: they keep their meaning while LET changes W, where PACT and LSQ, which learn
the threshold and the step themselves, do not follow.

a and b start at 4: gamma = beta = 0.982. Where a method before has decided ranges (``easyquant``, ``awq``) they start
at those, gamma and beta being shares of more than min and max where a range reaches further.

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
from bitwright.core.decisions import BlockDecisions, Decision, LinearDecision
from bitwright.core.method import Context, Learnable, Learned, Moments, Parameters, Range
from bitwright.core.scheme import Tile
from bitwright.steps.apply import weights_of
from bitwright.steps.range_search import search
from bitwright.steps.ranges import minmax

START = 4.0
LEAST = 0.05


class Clipping(Learnable):
    """a and b of every tile of every linear; gamma and beta are their sigmoids."""

    def __init__(self, block: Block, context: Context, decisions: BlockDecisions) -> None:
        """Starts at sigmoid(4), or at the ranges decided."""
        self.context = context
        self.tiles = {n: decisions.tile(n, context.scheme) for n in block.topology.linears}
        self.a, self.b, self.room = {}, {}, dict[str, Range]()
        for name, weight in weights_of(block, decisions).items():
            (b, low), (a, high) = _starts(weight, decisions.linear(name), self.tiles[name])
            self.a[name], self.b[name], self.room[name] = a.requires_grad_(), b.requires_grad_(), (low, high)
        self._seen: dict[str, tuple[Tensor, Range]] = {}
        rate = context.settings.lwc_lr
        super().__init__({"lwc.a": (self.a, rate), "lwc.b": (self.b, rate)})

    def range(self, linear: str, weight: Float[Tensor, "O I"], tile: Tile) -> Range:
        """low = beta min(W), high = gamma max(W)."""
        # A weight that nothing transforms is the same tensor in every step.
        if linear not in self._seen or self._seen[linear][0] is not weight:
            self._seen[linear] = (weight, self._ends(linear, weight))
        low, high = self._seen[linear][1]
        return self.b[linear].sigmoid() * low, self.a[linear].sigmoid() * high

    @torch.no_grad()
    def refine(self, linear: str, weight: Float[Tensor, "O I"], moments: Moments) -> None:
        """gamma and beta by coordinate descent."""
        a, b, ends = self.a[linear], self.b[linear], self._ends(linear, weight)
        grid, dtype = self.context.scheme.weight, self.context.scale_dtype
        beta, gamma = search(weight, (b.sigmoid(), a.sigmoid()), grid, self.tiles[linear], dtype, moments, ends)
        a.copy_(gamma.logit())
        b.copy_(beta.logit())

    def decide(self, parameters: Parameters, decisions: BlockDecisions) -> BlockDecisions:
        """The ranges on the transformed weights."""
        decided = {}
        for name in self.tiles:
            so_far = decisions.linear(name)
            low, high = self._ends(name, so_far.inside(parameters[f"{name}.weight"]))
            low, high = self.b[name].detach().sigmoid() * low, self.a[name].detach().sigmoid() * high
            decided[name] = replace(so_far, low=low, high=high)
        return decisions.with_linears(decided)

    def _ends(self, linear: str, weight: Float[Tensor, "O I"]) -> Range:
        """What gamma and beta are shares of: min-max, and more where the start reached further."""
        (low, high), room = minmax(weight, self.tiles[linear]), self.room[linear]
        return low * room[0], high * room[1]


@torch.no_grad()
def _starts(weight: Float[Tensor, "O I"], decided: LinearDecision, tile: Tile) -> list[tuple[Tensor, Tensor]]:
    """Of either end: b or a at the start, and how many times min-max they are shares of."""
    ends = minmax(decided.inside(weight), tile)
    start = torch.full_like(ends[0], START)
    if decided.low is None or decided.high is None:
        return [(start.clone(), torch.ones_like(start)) for _ in ends]
    found = []
    for wanted, end in zip((decided.low, decided.high), ends, strict=True):
        share = (wanted / end).nan_to_num(1.0, 1.0, 1.0).clamp(min=LEAST)
        further = share > start.sigmoid()
        room = (share / start.sigmoid()).where(further, torch.ones_like(share))
        found.append((start.where(further, share.logit()), room))
    return found


METHOD = Learned(
    decides=frozenset({Decision.RANGE}),
    starts_from=frozenset({Decision.RANGE}),
    learn=Clipping,
    uses=frozenset({"lwc_lr", "refine", "drift"}),
    refines=True,
)
