"""The range decision by search: the range of each tile whose quantized weights change the linear's output least.

With X the inputs of the full-precision linear and X' those of the quantized one, over the calibration data:

    minimise || W X - Wq X' ||^2 = tr(D H D^T) + 2 tr(W C D^T) + constant
    D = W - Wq,   H = E[x' x'^T],   C = E[(x - x') x'^T]

Rows are independent, and a tile's range changes only its own columns of D. So coordinate descent over tiles is exact:
each candidate is judged by its true error, with rounding and clipping. (A gradient sees rounding as a straight line.)
The result is never worse than the start. H is the matrix of GPTQ, arXiv 2210.17323; C compensates the error that
earlier quantized blocks left in X'.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from bitwright.core.grid import Grid, Tile, Zero
from bitwright.core.method import Moments, Range
from bitwright.core.qtensor import affine, integer_zero, offset, tiled
from bitwright.steps.ranges import minmax

LOWEST, LARGEST, COARSE = 0.35, 0.9995, 24
STEPS = (0.16, 0.08, 0.04, 0.02, 0.01)
TOGETHER = 2**16
"""The number of weights that are judged at once: of one candidate if tiles are wide, of several if they are narrow."""
Stage = list[tuple[float | None, float | None]]
"""Moves of a tile's two ends, of which the best is taken; None leaves an end as it is."""


@torch.no_grad()
def search(
    weight: Float[Tensor, "O I"],
    start: Range,
    grid: Grid,
    tile: Tile,
    scale_dtype: torch.dtype,
    moments: Moments,
    ends: Range | None = None,
) -> Range:
    """Search the range of each tile, as shares in (0, 1) of ``ends``, from the shares ``start``.

    ``ends`` are by default the smallest and the largest weight of the tile. The first sweep tries an even grid of
    shares for both ends together and for each alone, the second for each alone. Two more make small relative moves.
    """
    even = torch.linspace(LOWEST, LARGEST, COARSE).tolist()
    alone: list[Stage] = [[(share, None) for share in even], [(None, share) for share in even]]
    near: list[Stage] = []
    for less, more in ((1 - step, 1 + step) for step in STEPS):
        both: Stage = [(low, high) for low in (less, more) for high in (less, more)]
        near += [both, [(less, None), (more, None)], [(None, less), (None, more)]]
    descent = _Descent(weight, start, ends or minmax(weight, tile), grid, tile, scale_dtype, moments)
    descent.sweep([[(share, share) for share in even], *alone])
    descent.sweep(alone)
    descent.sweep(near, relative=True)
    descent.sweep(near, relative=True)
    return descent.low, descent.high


@torch.no_grad()
def shrunk(
    weight: Float[Tensor, "O I"],
    shares: Sequence[float],
    grid: Grid,
    tile: Tile,
    scale_dtype: torch.dtype,
    hessian: Float[Tensor, "I I"],
) -> Range:
    """Both ends of each tile's range, cut at a share of its largest magnitude (AWQ's clip search, arXiv 2306.00978).

    The share is the one that changes the tile's own part of the output least; of equal ones, the first.
    """
    tiles, (low, high) = tiled(weight, tile), minmax(weight, tile)
    most, columns, missing = torch.maximum(-low, high), tiles.shape[3], tiles[0, 0].numel() - weight.shape[1]
    hessian = _filled_up(hessian, missing, missing)
    for q in range(low.shape[1]):
        here = slice(q * columns, (q + 1) * columns)
        ends, least = (low[:, q].clone(), high[:, q].clone()), torch.full_like(low[:, q], torch.inf)
        for share in shares:
            cut = share * most[:, q]
            tried = ends[0].maximum(-cut), ends[1].minimum(cut)
            lost = _lost(tiles[:, :, q], *tried, grid, scale_dtype)
            error = _per_tile((lost @ hessian[here, here]) * lost, tiles.shape[1])
            better = error < least
            least = error.where(better, least)
            low[:, q], high[:, q] = tried[0].where(better, low[:, q]), tried[1].where(better, high[:, q])
    return low, high


class _Descent:
    """The current shares, and the difference D = W - Wq that follows from them."""

    def __init__(
        self,
        weight: Tensor,
        start: Range,
        ends: Range,
        grid: Grid,
        tile: Tile,
        scale_dtype: torch.dtype,
        moments: Moments,
    ) -> None:
        self.tiles, self.grid, self.scale_dtype = tiled(weight, tile), grid, scale_dtype
        self.ends = ends
        self.low, self.high = (share.detach().clamp(max=LARGEST) for share in start)
        missing = self.tiles[0, 0].numel() - weight.shape[1]
        self.hessian = _filled_up(moments.inputs, missing, missing)
        self.slope = _filled_up(weight @ moments.drift, missing)
        self.columns = self.tiles.shape[3]
        differences = [self._difference(q, self.low[:, q], self.high[:, q]) for q in range(self.low.shape[1])]
        self.difference = torch.cat(differences, dim=1)

    def sweep(self, stages: list[Stage], relative: bool = False) -> None:
        """Go through all columns of tiles; in each, take the best move of every stage if it lowers the error."""
        together = max(1, TOGETHER // (len(self.difference) * self.columns))
        for q in range(self.low.shape[1]):
            here = slice(q * self.columns, (q + 1) * self.columns)
            own, mine = self.hessian[here, here], self.difference[:, here]
            slope = 2 * (self.difference @ self.hessian[:, here] - mine @ own + self.slope[:, here])
            low, high, least = self.low[:, q], self.high[:, q], self._error(mine, own, slope)
            for stage in stages:
                lows, highs = (
                    _moved(shares, [m[end] for m in stage], relative) for end, shares in ((0, low), (1, high))
                )
                for low_to, high_to in zip(lows.split(together), highs.split(together), strict=True):
                    tried = self._difference(q, low_to, high_to)
                    error, which = self._error(tried, own, slope).min(dim=0)
                    better = error < least
                    least = error.where(better, least)
                    low, high = _chosen(low_to, which, better, low), _chosen(high_to, which, better, high)
                    mine = _chosen(self._by_tile(tried), which, better, self._by_tile(mine)).flatten(0, 1)
            self.low[:, q], self.high[:, q], self.difference[:, here] = low, high, mine

    def _error(self, difference: Tensor, hessian: Tensor, slope: Tensor) -> Float[Tensor, "*C P"]:
        return _per_tile((difference @ hessian + slope) * difference, self.tiles.shape[1])

    def _difference(self, q: int, low: Float[Tensor, "*C P"], high: Float[Tensor, "*C P"]) -> Float[Tensor, "*C O Ti"]:
        """The difference W - Wq in a column of tiles with these shares."""
        ends = low * self.ends[0][:, q], high * self.ends[1][:, q]
        return _lost(self.tiles[:, :, q], *ends, self.grid, self.scale_dtype)

    def _by_tile(self, difference: Float[Tensor, "*C O Ti"]) -> Float[Tensor, "*C P To Ti"]:
        return difference.view(*difference.shape[:-2], -1, *self.tiles.shape[1::2])


def _filled_up(matrix: Float[Tensor, "R I"], columns: int, rows: int = 0) -> Float[Tensor, "R I"]:
    """Add so many columns and rows of zeros, because the last tile of a row is filled up with zeros."""
    return torch.nn.functional.pad(matrix, (0, columns, 0, rows)) if columns else matrix


def _lost(
    tiles: Float[Tensor, "P To Ti"],
    low: Float[Tensor, "*C P"],
    high: Float[Tensor, "*C P"],
    grid: Grid,
    scale_dtype: torch.dtype,
) -> Float[Tensor, "*C O Ti"]:
    """The difference W - Wq in a column of tiles with these ranges."""
    scale, zero = affine(low, high, grid, scale_dtype)
    h = scale.float()[..., None, None]
    z = torch.zeros_like(h) if zero is None else integer_zero(scale, zero, grid).float()[..., None, None]
    if grid.zero is Zero.REAL and (moved := offset(scale, zero, grid)) is not None:
        tiles = tiles - moved[..., None, None]
    levels = (tiles / h).round_().add_(z).clamp_(grid.qmin, grid.qmax).sub_(z)
    return (tiles - levels.mul_(h)).flatten(-3, -2)


def _per_tile(values: Float[Tensor, "*C O Ti"], rows: int) -> Float[Tensor, "*C P"]:
    sums = values.sum(dim=-1)
    return sums.view(*sums.shape[:-1], -1, rows).sum(dim=-1)


def _moved(shares: Float[Tensor, " P"], to: list[float | None], relative: bool) -> Float[Tensor, "C P"]:
    """The shares that the moves of one end lead to; None leaves the share as it is."""
    if to[0] is None:
        return shares.expand(len(to), -1)
    factors = torch.tensor(to, device=shares.device)[:, None]
    return (shares * factors).clamp(max=LARGEST) if relative else factors.expand(-1, len(shares))


def _chosen(
    tried: Shaped[Tensor, "C P *N"], which: Int[Tensor, " P"], better: Bool[Tensor, " P"], kept: Shaped[Tensor, "P *N"]
) -> Shaped[Tensor, "P *N"]:
    """The best candidate of each tile, or what it has if no candidate is better."""
    best = tried[which, torch.arange(len(which), device=which.device)]
    return best.where(better.view(-1, *[1] * (kept.ndim - 1)), kept)
