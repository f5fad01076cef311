"""Quantize and dequantize in one differentiable step, for training through rounding.

The forward pass is the formula of ``core/qtensor.py``; the backward pass is written out, so that a step keeps one
float and one byte per weight instead of a chain of temporaries. Rounding counts as the identity (straight-through),
also for the zero point and for the scale's own rounding. With ``n = 2**bits - 1`` and ``r = (code - z) - W / h``:

    asymmetric            dWq/dW   dWq/dlow   dWq/dhigh
    inside the range         1      -r / n      r / n
    clipped from below       0        1           0
    clipped from above       0        0           1

A symmetric grid has one step, h = max(low / b, high / a), where b and a are the steps that the two ends may be from
zero (-n/2 and n/2; ``qtensor.reach``): dWq/dh is r inside and the code where clipped, and the gradient goes to the end
that decides.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bitwright.core.qtensor import affine, offset, reach, tiled, whole
from bitwright.core.scheme import Grid, Tile


def fake_quantize(
    weight: Float[Tensor, "O I"],
    low: Float[Tensor, "P Q"],
    high: Float[Tensor, "P Q"],
    grid: Grid,
    tile: Tile,
    scale_dtype: torch.dtype,
) -> Float[Tensor, "O I"]:
    """The weight that its codes stand for, in float32; differentiable in the weight and in its range."""
    quantized: Tensor = _FakeQuantize.apply(  # type: ignore[no-untyped-call]
        weight, low, high, grid, tile, scale_dtype
    )
    return quantized


def fake_quantize_tokens(x: Float[Tensor, "*B D"], grid: Grid) -> Float[Tensor, "*B D"]:
    """Activations quantized dynamically, one scale and zero point per row of the last dimension.

    Nothing is ever clipped, so the straight-through gradient is the identity.
    """
    quantized: Tensor = _FakeQuantizeTokens.apply(  # type: ignore[no-untyped-call]
        x, grid
    )
    return quantized


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, low: Tensor, high: Tensor, grid: Grid, tile: Tile, scale_dtype: torch.dtype
    ) -> Tensor:
        scale, zero = affine(low, high, grid, scale_dtype)
        h = scale.float()[:, None, :, None]
        z = torch.zeros_like(h) if zero is None else zero.float()[:, None, :, None]
        moved = offset(scale, zero, grid)
        ratio = (tiled(weight, tile) if moved is None else tiled(weight, tile) - moved[:, None, :, None]) / h
        code = ratio.round()
        residual = torch.sub(code, ratio, out=ratio)
        code += z
        level = code.clamp(grid.qmin, grid.qmax)
        side = code.sub_(level).clamp_(-1, 1)  # 1 clipped from above, -1 from below, 0 inside; masks of bool are slow
        clipped = side.abs()
        level -= z
        if grid.symmetric:
            slope = residual.addcmul_(level - residual, clipped)
        else:
            slope = residual.addcmul_(residual, clipped, value=-1).div_(grid.steps).add_(side.relu_())
        ctx.save_for_backward(slope, clipped.to(torch.int8), low, high)
        ctx.grid, ctx.tile = grid, tile
        made = level.mul_(h)
        if moved is not None:
            made += moved[:, None, :, None]
        return whole(made, weight.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        slope, clipped, low, high = ctx.saved_tensors
        g = tiled(gradients[0], ctx.tile)
        along = (g * slope).sum((1, 3))
        outside = g * clipped
        if ctx.grid.symmetric:
            low, high = low.clamp(max=0), high.clamp(min=0)
            below, above = reach(low, high, ctx.grid)
            decides = (low / below).abs() > (high / above).abs()
            dlow, dhigh = along / below * decides, along / above * ~decides
        else:
            dhigh = along
            dlow = outside.sum((1, 3)) - dhigh
        dweight = whole(g - outside, gradients[0].shape) if ctx.needs_input_grad[0] else None
        return dweight, dlow, dhigh, None, None, None


class _FakeQuantizeTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Grid) -> Tensor:
        low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
        scale, zero = affine(low, high, grid, x.dtype)
        z = torch.zeros_like(scale) if zero is None else zero.to(x.dtype)
        return (x / scale).round_().add_(z).clamp_(grid.qmin, grid.qmax).sub_(z).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
