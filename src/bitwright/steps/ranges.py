"""The range decision: which interval of its weights a tile's codes span."""

import torch
from jaxtyping import Float
from torch import Tensor

from bitwright.core.qtensor import affine, tiled
from bitwright.core.scheme import Grid, Tile

SHARES = torch.linspace(0.4, 1.0, 13)


def minmax(weight: Float[Tensor, "O I"], tile: Tile) -> tuple[Float[Tensor, "P Q"], Float[Tensor, "P Q"]]:
    """The smallest and the largest weight of each tile, as float32."""
    tiles = tiled(weight, tile).float()
    return tiles.amin(dim=(1, 3)), tiles.amax(dim=(1, 3))


def nearest_to_weights(
    weight: Float[Tensor, "O I"], grid: Grid, tile: Tile, scale_dtype: torch.dtype
) -> tuple[Float[Tensor, "P Q"], Float[Tensor, "P Q"]]:
    """Of each tile, the range whose rounded weights are nearest, || W - Wq ||^2, among shares of its two ends.

    Min-max is among them, so it is never worse than that.
    """
    tiles, (low, high) = tiled(weight, tile).float(), minmax(weight, tile)
    shares = SHARES.to(low)
    lows, highs = (torch.cartesian_prod(shares, shares).T[:, :, None, None] * end for end in (low, high))
    lows, highs = lows[0], highs[1]
    scale, zero = affine(lows, highs, grid, scale_dtype)
    h = scale.float()[:, :, None, :, None]
    z = torch.zeros_like(h) if zero is None else zero.float()[:, :, None, :, None]
    levels = (tiles / h).round_().add_(z).clamp_(grid.qmin, grid.qmax).sub_(z)
    lost = levels.mul_(h).sub_(tiles).square_().sum(dim=(2, 4))
    best = lost.flip(0).argmin(0, keepdim=True)  # flipped, so that of equals the widest is taken
    return lows.flip(0).gather(0, best)[0], highs.flip(0).gather(0, best)[0]
