"""Fit a quantized weight into another format: exactly if possible, else quantized again."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from math import gcd

import torch

from bitwright.core.convert import (
    described,
    difference,
    on_grid,
    require_finite,
    split,
    splits,
    takes_codes,
    with_scales,
)
from bitwright.core.decisions import LinearDecision
from bitwright.core.errors import RecipeError
from bitwright.core.format import Format, TensorFormat
from bitwright.core.grid import FULL, MAX_BITS, MIN_BITS, Grid, Tile
from bitwright.core.qtensor import QTensor
from bitwright.core.quantized import Difference
from bitwright.core.scheme import Scheme
from bitwright.steps.apply import quantize_linear
from bitwright.steps.range_fit import alignment_at, fitted

GROUPS = (128, 64, 32)


@dataclass(frozen=True)
class Groups:
    """Sizes of groups that linears of one model can have in common.

    ``usual`` is that of most linears with several groups in a row, None if there are none. Groups that a linear did not
    have divide ``common``, so that all linears of a model get the same.
    """

    usual: int | None = None
    common: int = 0

    @classmethod
    def of(cls, outlines: Iterable[QTensor]) -> "Groups":
        """The groups of these linears; their data may be missing."""
        weights = list(outlines)
        sizes = (weight.tile.in_ for weight in weights if weight.tile.out == 1 and weight.scale.shape[1] > 1)
        usual = max(sorted(Counter(sizes).items()), key=lambda counted: counted[1], default=(None, 0))[0]
        return cls(usual, gcd(*(weight.shape[1] for weight in weights)))


def refitted(
    name: str, weight: QTensor, format: TensorFormat, lossy: bool, groups: Groups | None = None
) -> tuple[QTensor, Difference]:
    """The weight as a format holds it, and its difference from the weight before.

    Raises CheckpointError for scales that are not finite; unless ``lossy``, RecipeError if the codes cannot be kept.
    """
    require_finite(name, weight)
    groups = groups or Groups()
    exact = _exactly(weight, format, groups)
    if exact is not None:
        return exact, difference(name, weight, exact)
    if not lossy:
        raise not_held(name, weight, format, _scales_beyond(weight, format))
    again = _again(name, weight, format, groups)
    return again, difference(name, weight, again, codes=False)


def foreseen(weight: QTensor, format: Format, lossy: bool, groups: Groups) -> tuple[Grid, Tile] | None:
    """The grid and tile that a weight will get in a format, told without its data; None if the format cannot hold it.

    Its codes may turn out not to fit after all, because of a zero point or a scale.
    """
    exact = next(_terms(weight, format, groups), None)
    return _nearest(weight, format, groups) if exact is None and lossy else exact


def not_held(name: str, weight: QTensor, format: Format, beyond: str = "") -> RecipeError:
    """The error of a weight whose codes a format cannot hold; ``beyond`` says what of its scales does not fit."""
    return RecipeError(
        f"{name}: {described(weight)} cannot be held exactly in this format, which holds {format.holds_what}{beyond}. "
        "--lossy quantizes such weights once more and says what that adds"
    )


def not_held_at_all(name: str, weight: QTensor, format: Format) -> RecipeError:
    """The error of a weight that no groups of a format divide, so that it cannot be quantized again either."""
    return RecipeError(f"{name} {list(weight.shape)}: fits into no groups that this format holds ({format.holds_what})")


def _terms(weight: QTensor, format: Format, groups: Groups) -> Iterator[tuple[Grid, Tile]]:
    """The grids and tiles of a format that may hold the codes of a weight, whose data may be missing; best first."""
    outliers = weight.outlier_index is not None and weight.outlier_index.numel() > 0
    for grid, tile in product(_grids(weight.grid), _tiles(weight, format, groups)):
        if format.holds(grid, tile, outliers) and takes_codes(grid, weight.grid) and splits(weight, tile):
            yield grid, tile


def _exactly(weight: QTensor, format: TensorFormat, groups: Groups) -> QTensor | None:
    """The weight's own codes on the first grid and tile that fit; None if none fit."""
    scaled = with_scales(weight, format.scales or weight.scale.dtype)
    if not scaled.scale.isfinite().all() or (scaled.scale == 0).any():
        return None
    for grid, tile in _terms(weight, format, groups):
        if (moved := _on(scaled, grid, tile)) is not None:
            return moved
    return None


def _on(weight: QTensor, grid: Grid, tile: Tile) -> QTensor | None:
    moved = on_grid(weight, grid)
    return None if moved is None else split(moved, tile)


def _grids(grid: Grid) -> Iterator[Grid]:
    """The weight's own grid, then others that may hold its codes, fewer bits first."""
    yield grid
    for bits, symmetric in product(range(grid.bits, MAX_BITS + 1), (False, True)):
        if (bits, symmetric) != (grid.bits, grid.symmetric):
            yield Grid.integers(bits, symmetric)


def _tiles(weight: QTensor, format: Format, groups: Groups) -> Iterator[Tile]:
    if weight.tile.size(weight.shape) == (1, weight.shape[1]) and not weight.grid.signed_scale:
        if groups.usual == weight.shape[1]:
            yield Tile(1, groups.usual)
        elif groups.usual is None or format.mixes:
            yield Tile(1, FULL)  # a reader cannot tell one group that is the whole row from a channel
    if groups.usual is not None and not format.mixes:
        yield Tile(1, groups.usual)
    yield weight.tile
    own = max(weight.tile.out, weight.tile.in_)  # for groups along the output, try groups of that size along the input
    for group in sorted(GROUPS, key=lambda size: size != own):
        if groups.common % group == 0:
            yield Tile(1, group)


def _again(name: str, weight: QTensor, format: TensorFormat, groups: Groups) -> QTensor:
    """Quantize the dequantized weight on the nearest grid and tile of the format, with the ranges of easyquant."""
    terms = _nearest(weight, format, groups)
    if terms is None:
        raise not_held_at_all(name, weight, format)
    grid, tile = terms
    dense, dtype = weight.dequantize(torch.float32), format.scales or weight.scale.dtype
    low, high = fitted(dense, grid, tile, dtype, alignment=alignment_at(grid.bits))
    return quantize_linear(dense, LinearDecision(low=low, high=high), Scheme(grid, tile), dtype)


def _nearest(weight: QTensor, format: Format, groups: Groups) -> tuple[Grid, Tile] | None:
    """The grid whose bits are nearest to the weight's (of two, the larger), and its own tile if the format holds it."""
    bits = sorted(range(MIN_BITS, MAX_BITS + 1), key=lambda b: (abs(b - weight.grid.bits), -b))
    grids = (
        Grid.integers(b, symmetric)
        for b, symmetric in product(bits, (weight.grid.symmetric, not weight.grid.symmetric))
    )
    tiles = [tile for tile in _tiles(weight, format, groups) if tile.in_ == FULL or groups.common % tile.in_ == 0]
    for grid, tile in product(grids, tiles):
        if tile.divides(weight.shape) and format.holds(grid, tile, False):
            return grid, tile
    return None


def _scales_beyond(weight: QTensor, format: TensorFormat) -> str:
    """The end of a refusal, if the scales are too large or too small for the format; "" if they fit."""
    scales = weight.scale.float().abs()
    held = scales.to(format.scales or scales.dtype)
    if bool(held.isfinite().all()) and not bool((held == 0).any()):
        return ""
    dtype = str(format.scales or weight.scale.dtype).removeprefix("torch.")
    return (
        f", with scales in {dtype}: those of this weight go from {float(scales.min()):.3g} to {float(scales.max()):.3g}"
    )
