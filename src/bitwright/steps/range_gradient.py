"""The range decision of EasyQuant (arXiv 2403.02775): gradient descent on the scale of a symmetric grid.

    L(h) = || W - h q ||^2,   q = clip(round(W / h)),   dL/dh = -2 sum q (W - h q)       with q fixed

It starts at the min-max range and uses Adam. Tiles are independent; the result is that of the last step. Where we
differ: the learning rate is relative to the scale at the start, so that it suits weights of any magnitude. The learning
rate and the number of steps are ours.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bitwright.core.grid import Grid, Tile
from bitwright.core.method import Range
from bitwright.core.qtensor import affine, span, tiled
from bitwright.steps.ranges import minmax

STEPS, RATE = 200, 3e-3


def by_gradient(weight: Float[Tensor, "O I"], grid: Grid, tile: Tile, scale_dtype: torch.dtype) -> Range:
    """The range of each tile [P, Q] on a symmetric grid; if the scale has a sign, it keeps the sign of min-max."""
    low, high = minmax(weight, tile)
    start = affine(low, high, grid, scale_dtype)[0].float()
    tiles, theta = tiled(weight, tile).float(), torch.ones_like(start).requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=RATE)
    size = tiles.square().sum((1, 3)).clamp(min=torch.finfo(torch.float32).tiny)
    with torch.no_grad():
        for _ in range(STEPS):
            h = (theta * start)[:, None, :, None]
            q = (tiles / h).round_().clamp_(grid.qmin, grid.qmax)
            theta.grad = -2 * (q * (tiles - h * q)).sum((1, 3)) * start / size
            optimizer.step()
            theta.clamp_(min=RATE)
    return span(theta.detach() * start, None, grid)
