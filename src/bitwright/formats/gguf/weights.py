"""A quantized linear in GGUF's blocks: with its own codes if a type has a place for them, else quantized once more.

Levels are codes less their zero point. If all levels that a grid can have lie within those of Q4_0 or Q8_0 the weight
is held exactly, provided its scales are numbers of float16: symmetric grids, and asymmetric ones of 2, 3, 5, 6 and 7
bits. Asymmetric codes of 4 bits go into Q4_1, whose minimum m = -z d is rounded to float16; so do codes of up to 4 bits
with a real minimum. A block has 32 weights of a row, so larger groups along the input repeat their scale.
"""

from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bitwright.core.convert import SquaredError, described, require_finite, rows_of
from bitwright.core.errors import CheckpointError, RecipeError
from bitwright.core.grid import FULL, Grid, Tile, Zero
from bitwright.core.panels import row_panels
from bitwright.core.qtensor import QTensor
from bitwright.core.quantized import Difference
from bitwright.formats.gguf.blocks import BLOCK, KINDS, Bytes, Fitted, chosen, nbytes_of, nearest, packed, valued

FEW_BITS = 4
SCALES_LOST = 1e-3
"""The relative squared error of a linear that kept its codes above which its scales are lost, not rounded."""
LEVELS_LOST = {Kind.Q4_0: 0.5, Kind.Q4_1: 0.5, Kind.Q8_0: SCALES_LOST, Kind.F16: 1e-4}
"""The error above which scales are lost if a linear was quantized once more, by its new type."""
SMALLEST_NORMAL = torch.finfo(torch.float16).tiny
Rows = slice | Int[Tensor, " R"]
HOLDS = (
    "2 to 7 bits, symmetric or not (2 to 4 with a real-valued zero), and 8 bits symmetric, per channel or in groups "
    f"along the input that are a multiple of {BLOCK}"
)


def levels_of(grid: Grid) -> tuple[int, int]:
    """The lowest and the highest level of a grid."""
    return (grid.qmin, grid.qmax) if grid.symmetric else (-grid.steps, grid.steps)


def kind_of(grid: Grid, columns: int) -> Kind:
    """The type of a linear with this grid and so many input features; F16 for rows that are no whole blocks."""
    if columns % BLOCK:
        return Kind.F16
    if _within(grid, Kind.Q4_0):
        return Kind.Q4_0
    return Kind.Q4_1 if grid.bits <= FEW_BITS and not grid.symmetric else Kind.Q8_0


def holds(grid: Grid, tile: Tile, outliers: bool) -> bool:
    """Whether codes of this grid in such tiles can be kept, whatever they are."""
    kind = kind_of(grid, BLOCK)
    return not outliers and _in_blocks(tile) and (kind is Kind.Q4_1 or _within(grid, kind))


def _within(grid: Grid, kind: Kind) -> bool:
    if grid.zero is Zero.REAL:
        return False
    lowest, highest = levels_of(grid)
    ends = ((lowest, highest), (-highest, -lowest))
    return any(KINDS[kind].lowest <= low and high <= KINDS[kind].highest for low, high in ends)


def _turned(grid: Grid, kind: Kind) -> bool:
    """Whether levels and scales change their sign: the grid has its further level above zero, the type below."""
    return _within(grid, kind) and levels_of(grid)[1] > KINDS[kind].highest


def _in_blocks(tile: Tile) -> bool:
    return tile.out == 1 and (tile.in_ == FULL or tile.in_ % BLOCK == 0)


@dataclass(frozen=True)
class Held:
    """The bytes of a linear, and what it lost."""

    data: Bytes
    difference: Difference


def held(name: str, weight: QTensor, kind: Kind, lossy: bool, order: Int[Tensor, " O"] | None = None) -> Held:
    """Put a linear into blocks of this type, its rows in ``order``.

    Raises RecipeError if its codes cannot be kept, unless ``lossy``: then blocks that hold theirs keep them, and the
    others are quantized once more.
    """
    require_finite(name, weight)
    out = np.empty((weight.shape[0], nbytes_of((weight.shape[1],), kind)), np.uint8)
    marked = _with_outliers(weight)
    dense = weight.dequantize(torch.float32) if marked is not None or weight.tile.out != 1 else None
    codes, error = True, SquaredError()
    for panel in row_panels(weight.shape):
        rows = panel if order is None else order[panel]
        before = rows_of(weight, rows).dequantize(torch.float32) if dense is None else dense[rows]
        out[panel], after, kept = _blocks(name, weight, rows, before, None if marked is None else marked[rows], kind)
        if not (kept or lossy):
            raise RecipeError(
                f"{name}: {described(weight)} cannot be held exactly in GGUF, which holds {HOLDS}. --lossy quantizes "
                "such weights once more and says what that adds"
            )
        codes = codes and kept
        error.add(before, after)
    _require_reached(name, weight, kind, error.relative, codes)
    return Held(out, Difference(name, codes, error.relative))


def _require_reached(name: str, weight: QTensor, kind: Kind, error: float, codes: bool) -> None:
    """Raise CheckpointError if small scales lost more than rounding to 11 bits, or to few levels, ever costs."""
    scale = weight.scale.float().abs()
    if error > (SCALES_LOST if codes else LEVELS_LOST[kind]) and bool((scale < SMALLEST_NORMAL).any()):
        raise CheckpointError(
            f"{name}: its scales are too small for float16, which GGUF has for them and which ends at 6e-8 (largest "
            f"{float(scale.max()):g}): a relative squared error of {error:.2g}. The folder is damaged, or its weights "
            "are far smaller than those of language models; leave it in a format whose scales are wider"
        )


def _blocks(
    name: str, weight: QTensor, rows: Rows, before: Float[Tensor, "R I"], marked: Bool[Tensor, "R B"] | None, kind: Kind
) -> tuple[Bytes, Float[Tensor, "R I"], bool]:
    """Pack rows: their bytes, the values that they have then, and whether all codes were kept."""
    if kind is Kind.F16:
        half = before.half()
        return half.numpy().view(np.uint8), half.float(), False
    if not _in_blocks(_tile(weight)) or (weight.grid.zero is Zero.REAL and kind is not Kind.Q4_1):
        blocks, kept = nearest(before, kind), False
    else:
        blocks = _as_they_are(name, weight, rows, kind)
        levels = blocks[0].view(len(before), -1, BLOCK)
        fits = (levels.amin(-1) >= KINDS[kind].lowest) & (levels.amax(-1) <= KINDS[kind].highest)
        fits = fits if marked is None else fits & ~marked
        kept = bool(fits.all())
        if not kept:
            blocks = chosen(blocks, nearest(before, kind), fits)
    return packed(*blocks, kind), valued(*blocks), kept


def _with_outliers(weight: QTensor) -> Bool[Tensor, "O B"] | None:
    """The blocks that have an outlier in them; None if there are no outliers."""
    if weight.outlier_index is None or not weight.outlier_index.numel():
        return None
    marked = torch.zeros(weight.shape[0], -(-weight.shape[1] // BLOCK), dtype=torch.bool)
    index = weight.outlier_index.long()
    marked[index // weight.shape[1], index % weight.shape[1] // BLOCK] = True
    return marked


def _tile(weight: QTensor) -> Tile:
    return Tile(*weight.tile.size(weight.shape))


def _as_they_are(name: str, weight: QTensor, rows: Rows, kind: Kind) -> Fitted:
    """The levels of rows, with the scales and minima of their groups repeated for each block."""
    group = torch.arange(0, weight.shape[1], BLOCK) // weight.tile.size(weight.shape)[1]
    scale = weight.scale[rows][:, group].float()
    d = scale.half()
    if not d.isfinite().all():
        raise CheckpointError(
            f"{name}: a scale is NaN or more than float16 holds ({float(scale.abs().max()):g}); the folder is damaged, "
            "or its weights are far larger than those of language models"
        )
    if kind is not Kind.Q4_1:
        levels, turned = _levels(weight, rows), _turned(weight.grid, kind)
        return (-levels, -d, None) if turned else (levels, d, None)
    assert weight.zero is not None
    zero = weight.zero[rows][:, group].float()
    m = (zero if weight.grid.zero is Zero.REAL else -zero * d.float()).half()
    return weight.codes[rows].to(torch.int16), d, m


def _levels(weight: QTensor, rows: Rows) -> Int[Tensor, "O I"]:
    codes = weight.codes[rows].to(torch.int16)
    if weight.zero is None:
        return codes
    zero = weight.zero[rows].to(torch.int16)
    return (codes.view(*zero.shape, -1) - zero[..., None]).view(codes.shape)
