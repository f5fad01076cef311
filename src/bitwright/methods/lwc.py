"""Learnable weight clipping, of OmniQuant: Omnidirectionally Calibrated Quantization for LLMs (arXiv 2308.13137).

Eq. 2, for each tile of a weight W at N bits, with gamma = sigmoid(a), beta = sigmoid(b):

    h = (gamma max(W) - beta min(W)) / (2^N - 1),   z = -round(beta min(W) / h)
    W_q = clamp(round(W / h) + z, 0, 2^N - 1)

gamma and beta are relative strengths: they keep their meaning while LET changes W. PACT and LSQ learn the threshold and
the step themselves, which do not follow.

a and b start at 4: gamma = beta = 0.982. If an earlier method has decided ranges (``easyquant``, ``awq``), they start
at those. If such a range reaches further than min and max, gamma and beta are shares of its own ends.

After training, each range is searched once more from its learned value, on the error of its linear's output
(``steps/range_search.py``), and kept if the block's error falls. This is ``refine``, which is not in the paper.

Where we differ besides: the gradient also passes through the rounding of the zero point, so that a clipped weight
pulls on its own end of the range alone. In training, h is rounded to the dtype it is stored in, as it will be written.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from bitwright.core.block import Block
from bitwright.core.decisions import BlockDecisions, Decision, LinearDecision
from bitwright.core.grid import Tile
from bitwright.core.method import Context, Learnable, Learned, Measured, Parameters, Range
from bitwright.methods._shared_settings import ClippingRate, Drift, Refine
from bitwright.steps.apply import weights_of
from bitwright.steps.range_search import search
from bitwright.steps.ranges import minmax

START = 4.0
LEAST = 0.05


@dataclass(frozen=True)
class LWCSettings(ClippingRate, Refine, Drift):
    """The settings of LWC: ``lwc_lr`` is the paper's, ``refine`` and ``drift`` are ours."""


class Clipping(Learnable):
    """The parameters a and b of every tile of every linear; gamma and beta are their sigmoids.

    The optimizer sees two tensors for all linears: in small blocks, an operation on all takes as long as on one.
    """

    def __init__(self, block: Block, context: Context[LWCSettings], decisions: BlockDecisions) -> None:
        """Start at sigmoid(4), or at the ranges decided before."""
        self.context, self.refines = context, context.settings.refine
        self.tiles = {n: decisions.tile(n, context.scheme(n)) for n in block.topology.linears}
        starts, self.room = {}, dict[str, Range]()
        for name, weight in weights_of(block, decisions).items():
            (b, low), (a, high) = _starts(weight, decisions.linear(name), self.tiles[name])
            starts[name], self.room[name] = (a, b), (low, high)
        self._all = [torch.cat([ends[n].flatten() for ends in starts.values()]).requires_grad_() for n in (0, 1)]
        self._shapes = {name: a.shape for name, (a, _) in starts.items()}
        self.a, self.b = (self._by_linear(every.detach()) for every in self._all)
        with torch.no_grad():
            self.transform({})
        self._seen: dict[str, tuple[Tensor, Range]] = {}
        rate = context.settings.lwc_lr
        super().__init__({f"lwc.{end}": ({"all": every}, rate) for end, every in zip("ab", self._all, strict=True)})

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters of each linear, as views of the two tensors."""
        return {f"lwc.{end}/{name}": p for end in "ab" for name, p in getattr(self, end).items()}

    def transform(self, parameters: Parameters) -> Parameters:
        """Compute gamma and beta of this step; the block's parameters stay as they are."""
        gamma, beta = (self._by_linear(every.sigmoid()) for every in self._all)
        self._shares: tuple[dict[str, Tensor], dict[str, Tensor]] = gamma, beta
        return parameters

    def range(self, linear: str, weight: Float[Tensor, "O I"], tile: Tile) -> Range:
        """The range low = beta min(W), high = gamma max(W)."""
        # A weight that nothing transforms is the same tensor in every step.
        if linear not in self._seen or self._seen[linear][0] is not weight:
            self._seen[linear] = (weight, self._ends(linear, weight))
        (gamma, beta), (low, high) = self._shares, self._seen[linear][1]
        return beta[linear] * low, gamma[linear] * high

    @torch.no_grad()
    def refine(self, linear: str, weight: Float[Tensor, "O I"], moments: Measured) -> None:
        """Search gamma and beta by coordinate descent."""
        a, b, ends = self.a[linear], self.b[linear], self._ends(linear, weight)
        grid, dtype = self.context.scheme(linear).weight, self.context.scale_dtype
        start, measured = (b.sigmoid(), a.sigmoid()), moments(drift=self.context.settings.drift)
        beta, gamma = search(weight, start, grid, self.tiles[linear], dtype, measured, ends)
        a.copy_(gamma.logit())
        b.copy_(beta.logit())

    def decide(self, parameters: Parameters, decisions: BlockDecisions) -> BlockDecisions:
        """The ranges on the transformed weights."""
        decided = {}
        for name in self.tiles:
            so_far = decisions.linear(name)
            low, high = self._ends(name, so_far.inside(parameters[f"{name}.weight"]))
            low, high = self.b[name].sigmoid() * low, self.a[name].sigmoid() * high
            decided[name] = replace(so_far, low=low, high=high)
        return decisions.with_linears(decided)

    def _by_linear(self, every: Tensor) -> dict[str, Tensor]:
        """The part of each linear, as a view."""
        parts = every.split([shape.numel() for shape in self._shapes.values()])
        return {name: part.view(shape) for part, (name, shape) in zip(parts, self._shapes.items(), strict=True)}

    def _ends(self, linear: str, weight: Float[Tensor, "O I"]) -> Range:
        """The ends that gamma and beta are shares of: min-max, or more if the ranges decided before reach further."""
        (low, high), room = minmax(weight, self.tiles[linear]), self.room[linear]
        return low * room[0], high * room[1]


@torch.no_grad()
def _starts(weight: Float[Tensor, "O I"], decided: LinearDecision, tile: Tile) -> list[tuple[Tensor, Tensor]]:
    """The start for the low and the high end: b or a, and the multiple of min-max that its sigmoid is a share of."""
    ends = minmax(decided.inside(weight), tile)
    start = torch.full_like(ends[0], START)
    if decided.low is None or decided.high is None:
        return [(start.clone(), torch.ones_like(start)) for _ in ends]
    starts = []
    for wanted, end in zip((decided.low, decided.high), ends, strict=True):
        share = (wanted / end).nan_to_num(1.0, 1.0, 1.0).clamp(min=LEAST)
        further = share > start.sigmoid()
        room = (share / start.sigmoid()).where(further, torch.ones_like(share))
        starts.append((start.where(further, share.logit()), room))
    return starts


def closed(settings: LWCSettings) -> bool:
    """Whether ranges are searched after training."""
    return settings.refine


METHOD = Learned(
    summary="learn how far ranges are clipped, starting from an earlier method's ranges if there are any (OmniQuant)",
    settings=LWCSettings,
    decides=frozenset({Decision.RANGE}),
    starts_from=frozenset({Decision.RANGE}),
    learn=Clipping,
    closed=closed,
)
