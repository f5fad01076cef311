"""The range decision: the interval of weights that a tile's codes span."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bitwright.core.grid import Grid, Tile, Zero
from bitwright.core.panels import in_cache
from bitwright.core.qtensor import affine, integer_zero, offset, tiled

SHARES = torch.linspace(0.4, 1.0, 13)
TOGETHER = 2**22
"""The number of weights times candidates that are computed at a time."""


def minmax(weight: Float[Tensor, "O I"], tile: Tile) -> tuple[Float[Tensor, "P Q"], Float[Tensor, "P Q"]]:
    """The smallest and the largest weight of each tile, as float32; differentiable."""
    ends: tuple[Tensor, Tensor] = _MinMax.apply(tiled(weight, tile).float())  # type: ignore[no-untyped-call]
    return ends


class _MinMax(torch.autograd.Function):
    """Both ends at once; gradients are written panel by panel, and weights that share an end share its gradient."""

    @staticmethod
    def forward(ctx: Any, tiles: Tensor) -> tuple[Tensor, Tensor]:
        low, high = tiles.amin(dim=(1, 3)), tiles.amax(dim=(1, 3))
        ctx.save_for_backward(tiles, low, high)
        return low, high

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        tiles, low, high = ctx.saved_tensors
        gradient = torch.empty_like(tiles)
        for weight, least, most, down, up, into in in_cache(tiles, low, high, *gradients, gradient):
            at_least, at_most = (
                torch.eq(weight, end[:, None, :, None], out=torch.empty_like(weight)) for end in (least, most)
            )
            torch.mul(at_least, (down / at_least.sum((1, 3)))[:, None, :, None], out=into)
            into.addcmul_(at_most, (up / at_most.sum((1, 3)))[:, None, :, None])
        return gradient


def nearest_to_weights(
    weight: Float[Tensor, "O I"], grid: Grid, tile: Tile, scale_dtype: torch.dtype, *, norm: float = 2.0
) -> tuple[Float[Tensor, "P Q"], Float[Tensor, "P Q"]]:
    """The range of each tile with the least sum |W - Wq|^p, among shares of its two ends.

    Min-max is among them, so the result is never worse.
    """
    tiles, (low, high) = tiled(weight, tile), minmax(weight, tile)
    shares = torch.cartesian_prod(SHARES, SHARES).T[:, :, None, None].to(low)
    at_once = max(1, TOGETHER // (shares.shape[1] * tiles[0].numel()))
    ranges = [
        _nearest(part[0], part[1], part[2], shares, grid, scale_dtype, norm)
        for part in zip(*(x.split(at_once) for x in (tiles, low, high)), strict=True)
    ]
    lows, highs = zip(*ranges, strict=True)
    return torch.cat(lows), torch.cat(highs)


def _nearest(
    tiles: Float[Tensor, "P To Q Ti"],
    low: Float[Tensor, "P Q"],
    high: Float[Tensor, "P Q"],
    shares: Float[Tensor, "2 C 1 1"],
    grid: Grid,
    scale_dtype: torch.dtype,
    norm: float,
) -> tuple[Float[Tensor, "P Q"], Float[Tensor, "P Q"]]:
    tiles, lows, highs = tiles.float(), shares[0] * low, shares[1] * high
    scale, zero = affine(lows, highs, grid, scale_dtype)
    h = scale.float()[:, :, None, :, None]
    z = torch.zeros_like(h) if zero is None else integer_zero(scale, zero, grid).float()[:, :, None, :, None]
    if grid.zero is Zero.REAL and (moved := offset(scale, zero, grid)) is not None:
        tiles = tiles - moved[:, :, None, :, None]
    levels = (tiles / h).round_().add_(z).clamp_(grid.qmin, grid.qmax).sub_(z)
    error = levels.mul_(h).sub_(tiles)
    lost = (error.square_() if norm == 2 else error.abs_().pow_(norm)).sum(dim=(2, 4))
    best = lost.flip(0).argmin(0, keepdim=True)  # flipped, so that of equal candidates the widest is taken
    return lows.flip(0).gather(0, best)[0], highs.flip(0).gather(0, best)[0]
