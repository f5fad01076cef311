"""Quantize and dequantize in one differentiable step, for training through rounding.

The forward pass is the formula of ``core/qtensor.py``. The backward pass is written out, so that a step keeps one
number per weight instead of a chain of temporaries. Rounding counts as the identity (straight-through), also for the
zero point and for the scale's own rounding. With ``n = 2**bits - 1`` and ``r = (code - z) - W / h``:

    asymmetric            dWq/dW   dWq/dlow   dWq/dhigh
    inside the range         1      -r / n      r / n
    clipped from below       0        1           0
    clipped from above       0        0           1

A symmetric grid has one step, h = max(low / b, high / a), if the two ends may be b and a steps from zero (-n/2 and n/2;
``qtensor.reach``). dWq/dh is r inside and the code if clipped, and the gradient goes to the end that decides h.

The number that is kept per weight is r, moved away from it by 2 if the weight is clipped: |r| is at most 1/2, so the
sign tells the side. Weights are processed in panels whose temporaries stay in a core's cache; on a large weight that is
several times faster than whole passes.
"""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bitwright.core.grid import Grid, Tile
from bitwright.core.panels import in_cache
from bitwright.core.qtensor import affine, integer_zero, offset, reach, tiled, whole

SMALL = 2**18
"""The size of a weight, in elements, up to which a call takes longer than its arithmetic."""


def fake_quantize(
    weight: Float[Tensor, "O I"],
    low: Float[Tensor, "P Q"],
    high: Float[Tensor, "P Q"],
    grid: Grid,
    tile: Tile,
    scale_dtype: torch.dtype,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "O I"]:
    """The weight that its codes stand for; differentiable in the weight and in its range.

    Computed in float32; ``dtype`` is that of the result and of what is kept for the backward pass.
    """
    quantized: Tensor = _FakeQuantize.apply(  # type: ignore[no-untyped-call]
        weight, low, high, grid, tile, scale_dtype, dtype
    )
    return quantized


class FakeQuantizer:
    """A ``fake_quantize`` of several weights that is called in every training step.

    Small weights whose tiles are rows of one length are joined: that takes hardly longer than one of them alone.
    """

    def __init__(
        self, tiles: Sequence[Tile], grids: Sequence[Grid], scale_dtype: torch.dtype, dtype: torch.dtype = torch.float32
    ) -> None:
        """Take the tile and the grid of each weight."""
        self.tiles, self.grids, self.scale_dtype, self.dtype = tiles, grids, scale_dtype, dtype
        self._joined: dict[_Kind, tuple[list[Tensor], Tensor]] = {}

    def __call__(
        self,
        weights: Sequence[Float[Tensor, "O I"]],
        ranges: Sequence[tuple[Float[Tensor, "P Q"], Float[Tensor, "P Q"]]],
    ) -> list[Float[Tensor, "O I"]]:
        """Quantize and dequantize the weights, as ``fake_quantize`` does."""
        kinds = [_kind(weight, tile, grid) for weight, tile, grid in zip(weights, self.tiles, self.grids, strict=True)]
        quantized: dict[int, Tensor] = {}
        for kind in dict.fromkeys(kinds):
            alike = [n for n, other in enumerate(kinds) if other == kind]
            if kind is None or len(alike) == 1:
                for n in alike:
                    quantized[n] = self._fake_quantize(weights[n], *ranges[n], self.grids[n], self.tiles[n])
                continue
            length, grid = kind
            low, high = (torch.cat([ranges[n][end].reshape(-1, 1) for n in alike]) for end in (0, 1))
            rows = self._rows([weights[n] for n in alike], kind)
            rows = self._fake_quantize(rows, low, high, grid, Tile(1, length))
            parts = rows.split([weights[n].numel() // length for n in alike])
            quantized |= {n: part.view(weights[n].shape) for n, part in zip(alike, parts, strict=True)}
        return [quantized[n] for n in range(len(weights))]

    def _fake_quantize(self, weight: Tensor, low: Tensor, high: Tensor, grid: Grid, tile: Tile) -> Tensor:
        return fake_quantize(weight, low, high, grid, tile, self.scale_dtype, self.dtype)

    def _rows(self, weights: list[Tensor], kind: "_Kind") -> Float[Tensor, "R n"]:
        """The tiles of some weights as rows; weights that nothing transforms are the same tensors in every step."""
        before, rows = self._joined.get(kind, ([], None))
        if rows is None or rows.requires_grad or any(a is not b for a, b in zip_longest(before, weights)):
            rows = torch.cat([weight.reshape(-1, kind[0]) for weight in weights])
            self._joined[kind] = (weights, rows)
        return rows


_Kind = tuple[int, Grid]


def _kind(weight: Float[Tensor, "O I"], tile: Tile, grid: Grid) -> _Kind | None:
    """The length of the tiles of a small weight if they are rows, and its grid; None for any other weight."""
    columns = weight.shape[1]
    length = tile.size((weight.shape[0], columns))[1]
    together = tile.out == 1 and columns % length == 0 and weight.numel() <= SMALL
    return (length, grid) if together else None


def fake_quantize_tokens(x: Float[Tensor, "*B D"], grid: Grid) -> Float[Tensor, "*B D"]:
    """Quantize activations dynamically, with one scale and zero point per row of the last dimension.

    No value is ever clipped, so the straight-through gradient is the identity. Computed in x's own dtype, but under
    autocast in float32, as without autocast: 8 bits of a short dtype cannot tell the codes of 8-bit activations apart.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.float()
    quantized: Tensor = _FakeQuantizeTokens.apply(  # type: ignore[no-untyped-call]
        x, grid
    )
    return quantized


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        low: Tensor,
        high: Tensor,
        grid: Grid,
        tile: Tile,
        scale_dtype: torch.dtype,
        dtype: torch.dtype,
    ) -> Tensor:
        scale, zero = affine(low, high, grid, scale_dtype)
        h = scale.float()[:, None, :, None]
        z = torch.zeros_like(h) if zero is None else integer_zero(scale, zero, grid).float()[:, None, :, None]
        least, most = grid.qmin - z, grid.qmax - z
        moved, tiles = offset(scale, zero, grid), tiled(weight, tile)
        if moved is not None:
            tiles = tiles - moved[:, None, :, None]
        result, kept = (torch.empty(tiles.shape, dtype=dtype, device=weight.device) for _ in range(2))
        for part in in_cache(tiles, h, least, most, result, kept):
            _quantize_panel(*part)
        ctx.save_for_backward(kept, low, high)
        ctx.grid, ctx.tile = grid, tile
        if moved is not None:
            result += moved[:, None, :, None]
        return whole(result, weight.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        kept, low, high = ctx.saved_tensors
        grid, g = ctx.grid, tiled(gradients[0], ctx.tile)
        dweight = torch.empty(g.shape, device=g.device) if ctx.needs_input_grad[0] else None
        parts = in_cache(g, kept) if dweight is None else in_cache(g, kept, dweight)
        rounding, signed, clipped = (torch.cat(sums) for sums in zip(*(_sums(*p) for p in parts), strict=True))
        above, below = (clipped + signed) / 2, (clipped - signed) / 2
        if grid.symmetric:
            along = rounding + grid.qmax * above + grid.qmin * below
            low, high = low.clamp(max=0), high.clamp(min=0)
            first, last = reach(low, high, grid)
            decides = (low / first).abs() > (high / last).abs()
            dlow, dhigh = along / first * decides, along / last * ~decides
        else:
            dhigh = rounding / grid.steps + above
            dlow = below - rounding / grid.steps
        return None if dweight is None else whole(dweight, gradients[0].shape), dlow, dhigh, None, None, None, None


def _quantize_panel(weight: Tensor, h: Tensor, least: Tensor, most: Tensor, result: Tensor, kept: Tensor) -> None:
    """Fill ``result`` with the quantized weight, and ``kept`` with r, 2 away from it where clipped.

    ``least`` and ``most`` bound the codes, the zero point subtracted.
    """
    ratio = weight / h
    code = ratio.round()
    r = torch.sub(code, ratio, out=ratio)
    level = torch.maximum(code, least)  # clamp with tensors as bounds is many times slower
    torch.minimum(level, most, out=level)
    beyond = code.sub_(level).clamp_(-1, 1)
    kept.copy_(r.add_(beyond, alpha=2))
    result.copy_(level.mul_(h))


def _sums(g: Tensor, kept: Tensor, dweight: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Three sums over each tile: g r inside, g where clipped with the sign of the side, and g where clipped.

    Fills ``dweight`` with g inside the range and with zero outside.
    """
    g, kept = g.float(), kept.float()
    side = kept.round().clamp_(-1, 1)
    signed = g * side
    clipped = side.mul_(signed)
    sums = signed.sum((1, 3)), clipped.sum((1, 3))
    inside = torch.sub(g, clipped, out=clipped if dweight is None else dweight)
    return (inside * kept).sum((1, 3)), *sums


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
