"""The range decision: which interval of its weights a tile's codes span."""

import torch
from jaxtyping import Float
from torch import Tensor

from bitwright.core.qtensor import affine, dequantize, quantize, tiled
from bitwright.core.scheme import Grid, Tile

SHRINKS = 28
SMALLEST_SHRINK = 0.3


def minmax(weight: Float[Tensor, "O I"], tile: Tile) -> tuple[Float[Tensor, "P Q"], Float[Tensor, "P Q"]]:
    """The smallest and the largest weight of each tile, as float32."""
    low, high = tiled(weight, tile).float().aminmax(dim=3)
    return low.amin(dim=1), high.amax(dim=1)


def search_shrink(
    weight: Float[Tensor, "O I"], tile: Tile, grid: Grid, scale_dtype: torch.dtype, importance: Float[Tensor, " I"]
) -> Float[Tensor, "P Q"]:
    """The factor in [0.3, 1] by which shrinking each tile's min-max range gives the least weighted squared error.

    The error of column i counts ``importance[i]`` times. The factor 1, min-max itself, is among those tried.
    """
    low, high = minmax(weight, tile)
    importance = importance.expand(weight.shape)
    best = torch.ones_like(low)
    least = torch.full_like(low, torch.inf)
    for shrink in torch.linspace(1, SMALLEST_SHRINK, SHRINKS):
        scale, zero = affine(low * shrink, high * shrink, grid, scale_dtype)
        error = dequantize(quantize(weight, scale, zero, grid, tile), scale.float(), zero, tile) - weight
        total = tiled(error.square_().mul_(importance), tile).sum((1, 3))
        best = torch.where(total < least, shrink, best)
        least = torch.minimum(total, least)
    return best
