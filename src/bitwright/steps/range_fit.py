"""The range decision without data: of each tile, the range whose quantized weights stay nearest to the weights.

With e = W_q - W and W_q = (code - z) h, over a tile:

    minimise  sum e^2 + lambda (sum e W)^2 / sum W^2

At lambda = 0 that is the squared error (EasyQuant, arXiv 2403.02775). The second term is ours. A range that clips
makes the large weights of a tile smaller, so that e points against W; and what a linear reads varies more along its own
weights than elsewhere (``benchmarks/alignment.py``). Errors along W count 1 + lambda times.

For codes that stay as they are, the best h, or h and z, is a linear least-squares problem with a closed form; with it
the codes are found again. That ends in a local minimum near its start, so it starts from the best few of many shrunken
min-max ranges, and the best that was seen is kept; min-max is among them.

The loss needs three sums over a tile, of q^2, q and q W with q = code - z. In a sorted tile each code is a stretch, so
they follow from where the stretches end: a few searches instead of a pass over all weights.
"""

from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

from bitwright.core.method import Range
from bitwright.core.qtensor import affine, tiled
from bitwright.core.scheme import Grid, Tile

POLISHED, PASSES = 2, 4
TOGETHER = 2**21
"""Weights at a time."""
FEW, MANY = 3, 4
"""Bits."""
Steps = tuple[Float[Tensor, " M"], Float[Tensor, " M"]]
"""h and z of M tiles; z is 0 on a symmetric grid."""


@torch.no_grad()
def fitted(
    weight: Float[Tensor, "O I"], grid: Grid, tile: Tile, scale_dtype: torch.dtype, *, alignment: float
) -> Range:
    """Low and high end of each tile's range [P, Q], float32; ``alignment`` is lambda.

    On the objective it is never worse than min-max.
    """
    tiles = tiled(weight, tile).transpose(1, 2)
    (p, q), flat = tiles.shape[:2], tiles.flatten(2).flatten(0, 1)
    low, high = torch.empty(2, len(flat), device=flat.device)
    at_once = max(1, TOGETHER // flat.shape[1])
    for start in range(0, len(flat), at_once):
        here = slice(start, start + at_once)
        h, z = _Fit(flat[here].float().contiguous(), grid, scale_dtype, alignment).best()
        below = torch.full_like(z, grid.steps / 2) if grid.symmetric else z
        low[here], high[here] = -below * h, (grid.steps - below) * h
    return low.view(p, q), high.view(p, q)


@dataclass(frozen=True)
class _Sums:
    """Over a tile: of q^2, of q, and of q W."""

    qq: Float[Tensor, " M"]
    q: Float[Tensor, " M"]
    qw: Float[Tensor, " M"]


class _Fit:
    """Some tiles, their weights in rows."""

    def __init__(self, weights: Float[Tensor, "M n"], grid: Grid, dtype: torch.dtype, alignment: float) -> None:
        self.sorted, self.n = weights.sort(dim=1).values, weights.shape[1]
        self.grid, self.dtype, self.alignment = grid, dtype, alignment
        self.before = torch.nn.functional.pad(self.sorted.double().cumsum(1), (1, 0))
        """Sums of the smallest 0, 1, ... n weights."""
        self.total = self.before[:, -1]
        self.ww = self.sorted.double().square().sum(1).clamp(min=torch.finfo(torch.float64).tiny)
        self.codes = torch.arange(grid.qmin, grid.qmax, device=weights.device)

    def best(self) -> Steps:
        """The best h and z of all that is tried."""
        low, high = self.sorted[:, 0], self.sorted[:, -1]
        starts = [self._minmax(a * low, b * high) for a, b in _shares(self.grid)]
        losses = torch.stack([self._loss(steps[0], self._sums(*steps)) for steps in starts])
        hs, zs = (torch.stack(values) for values in zip(*starts, strict=True))
        best = self._exact(low, high)
        least = self._loss(best[0], self._sums(*best))
        for at in losses.argsort(dim=0, stable=True)[:POLISHED]:
            h, z = hs.gather(0, at[None])[0], zs.gather(0, at[None])[0]
            for _ in range(PASSES):
                sums = self._sums(h, z)
                lost = self._loss(h, sums)
                better = lost < least
                least, best = lost.where(better, least), (h.where(better, best[0]), z.where(better, best[1]))
                h, z = self._polished(h, z, sums)
        return best

    def _minmax(self, low: Float[Tensor, " M"], high: Float[Tensor, " M"]) -> Steps:
        h, z = affine(low[:, None], high[:, None], self.grid, self.dtype)
        return h[:, 0].float(), torch.zeros_like(low) if z is None else z[:, 0].float()

    def _exact(self, low: Float[Tensor, " M"], high: Float[Tensor, " M"]) -> Steps:
        """h the largest magnitude itself: nothing is lost of a tile that holds one value, or that and zeros."""
        most, negative = torch.maximum(high, -low), (-low > high).float()
        h = torch.where(most > 0, most, torch.ones_like(most)).to(self.dtype).float()
        return h, torch.zeros_like(h) if self.grid.symmetric else negative

    def _sums(self, h: Float[Tensor, " M"], z: Float[Tensor, " M"]) -> _Sums:
        """With everything at the highest code, less what each boundary between two codes takes off below it."""
        levels = self.codes - z[:, None]
        below = torch.searchsorted(self.sorted, (levels + 0.5) * h[:, None])
        top = (self.grid.qmax - z).double()
        return _Sums(
            qq=top.square() * self.n - ((2 * levels + 1) * below).sum(1, dtype=torch.float64),
            q=top * self.n - below.sum(1),
            qw=top * self.total - self.before.gather(1, below).sum(1),
        )

    def _loss(self, h: Float[Tensor, " M"], sums: _Sums) -> Float[Tensor, " M"]:
        """e = h q - W, put into the sums."""
        error = h * (h * sums.qq - 2 * sums.qw) + self.ww
        return error + self.alignment * (h * sums.qw - self.ww).square() / self.ww

    def _polished(self, h: Float[Tensor, " M"], z: Float[Tensor, " M"], sums: _Sums) -> Steps:
        """The best h and z for codes as they are: W ~ h q + b, then z moved by the whole number nearest to b / h."""
        k, qq, qw = self.alignment / self.ww, sums.qq, sums.qw
        if not self.grid.symmetric:
            a, b, c = qq + k * qw.square(), sums.q + k * qw * self.total, self.n + k * self.total.square()
            of_q, of_one = (1 + self.alignment) * qw, (1 + self.alignment) * self.total
            shift = (of_one * a - of_q * b) / (of_q * c - of_one * b)
            to = (z - shift).nan_to_num(0.0, 0.0, 0.0).round().clamp(self.grid.qmin, self.grid.qmax)
            by, z = z - to, to.float()
            qq, qw = qq + by * (2 * sums.q + by * self.n), qw + by * self.total
        found = ((1 + self.alignment) * qw / (qq + k * qw.square())).to(self.dtype).float()
        return found.where(found.isfinite() & (found > 0), h), z


def _shares(grid: Grid) -> list[tuple[float, float]]:
    """How much of the two ends to start from. At few bits they are cut apart, at many hardly at all."""
    if grid.bits <= FEW and not grid.symmetric:
        return list(product(torch.linspace(1.0, 0.3, 6).tolist(), repeat=2))
    both = torch.linspace(1.0, 0.3, 16) if grid.bits <= MANY else torch.linspace(1.0, 0.8, 8)
    return [(share, share) for share in both.tolist()]
