"""A quantized weight in terms that another format holds: exactly if that can be, else quantized once more."""

from collections.abc import Iterator
from itertools import product

import torch

from bitwright.core.convert import described, difference, on_grid, split, with_scales
from bitwright.core.decisions import LinearDecision
from bitwright.core.errors import RecipeError
from bitwright.core.format import TensorFormat
from bitwright.core.grid import FULL, MAX_BITS, MIN_BITS, Grid, Tile
from bitwright.core.qtensor import QTensor
from bitwright.core.quantized import Difference
from bitwright.core.scheme import Scheme
from bitwright.steps.apply import quantize_linear
from bitwright.steps.range_fit import alignment_at, fitted

GROUPS = (128, 64, 32)


def refitted(
    name: str, weight: QTensor, format: TensorFormat, lossy: bool, common: int = 0
) -> tuple[QTensor, Difference]:
    """The weight as a format holds it, and what it lost.

    Groups that it did not have divide ``common``, so that all linears of a model get the same. Raises RecipeError if
    its codes cannot be kept, unless ``lossy``.
    """
    exact = _exactly(weight, format, common)
    if exact is not None:
        return exact, difference(name, weight, exact)
    if not lossy:
        raise RecipeError(
            f"{name}: {described(weight)} cannot be held exactly in this format, which holds "
            f"{format.holds_what}. --lossy quantizes such weights once more and says what that adds"
        )
    again = _again(name, weight, format, common)
    return again, difference(name, weight, again, codes=False)


def _exactly(weight: QTensor, format: TensorFormat, common: int) -> QTensor | None:
    """The weight's own codes on the first terms that fit; None if there are none."""
    outliers = weight.outlier_index is not None and weight.outlier_index.numel() > 0
    scaled = with_scales(weight, format.scales or weight.scale.dtype)
    if not scaled.scale.isfinite().all() or (scaled.scale == 0).any():
        return None
    for grid, tile in product(_grids(weight.grid), _tiles(weight, common)):
        if format.holds(grid, tile, outliers) and (moved := _on(scaled, grid, tile)) is not None:
            return moved
    return None


def _on(weight: QTensor, grid: Grid, tile: Tile) -> QTensor | None:
    moved = on_grid(weight, grid)
    return None if moved is None else split(moved, tile)


def _grids(grid: Grid) -> Iterator[Grid]:
    """The weight's own grid, then others that may hold its codes, small ones first."""
    yield grid
    for bits, symmetric in product(range(grid.bits, MAX_BITS + 1), (False, True)):
        if (bits, symmetric) != (grid.bits, grid.symmetric):
            yield Grid.integers(bits, symmetric)


def _tiles(weight: QTensor, common: int) -> Iterator[Tile]:
    if weight.tile.size(weight.shape) == (1, weight.shape[1]) and not weight.grid.signed_scale:
        yield Tile(1, FULL)  # a reader cannot tell one group that is the whole row from a channel
    yield weight.tile
    own = max(weight.tile.out, weight.tile.in_)  # groups along the output are as large along the input
    for group in sorted(GROUPS, key=lambda size: size != own):
        if common % group == 0:
            yield Tile(1, group)


def _again(name: str, weight: QTensor, format: TensorFormat, common: int) -> QTensor:
    """The dequantized weight on the nearest terms that the format holds, with ranges as easyquant finds them."""
    terms = _nearest(weight, format, common)
    if terms is None:
        raise RecipeError(
            f"{name} {list(weight.shape)}: fits into no groups that this format holds ({format.holds_what})"
        )
    grid, tile = terms
    dense, dtype = weight.dequantize(torch.float32), format.scales or weight.scale.dtype
    low, high = fitted(dense, grid, tile, dtype, alignment=alignment_at(grid.bits))
    return quantize_linear(dense, LinearDecision(low=low, high=high), Scheme(grid, tile), dtype)


def _nearest(weight: QTensor, format: TensorFormat, common: int) -> tuple[Grid, Tile] | None:
    """The bits nearest to the weight's, more rather than fewer; its own tile if that is held."""
    bits = sorted(range(MIN_BITS, MAX_BITS + 1), key=lambda b: (abs(b - weight.grid.bits), -b))
    grids = (
        Grid.integers(b, symmetric)
        for b, symmetric in product(bits, (weight.grid.symmetric, not weight.grid.symmetric))
    )
    tiles = [tile for tile in _tiles(weight, common) if tile.in_ == FULL or common % tile.in_ == 0]
    for grid, tile in product(grids, tiles):
        if tile.divides(weight.shape) and format.holds(grid, tile, False):
            return grid, tile
    return None
