"""Conversions of a quantized weight to other terms, the values unchanged: what one format needs, from another.

Nothing here quantizes again. A function returns None if the weight cannot be expressed in the terms asked for.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from bitwright.core.errors import CheckpointError
from bitwright.core.grid import Grid, Tile, Zero
from bitwright.core.qtensor import QTensor, tiled, whole
from bitwright.core.quantized import Difference


def require_finite(name: str, weight: QTensor) -> None:
    """Raise CheckpointError for a weight that is NaN or infinite: no format holds it."""
    parts = (("scales", weight.scale), ("minimums", weight.zero), ("outliers", weight.outlier_value))
    for what, numbers in parts:
        if numbers is not None and (wrong := int((~numbers.isfinite()).sum())):
            raise CheckpointError(
                f"{name}: {wrong} of its {numbers.numel()} {what} are not finite (NaN or infinite), which no format "
                "holds; the folder is damaged: download or quantize it again"
            )


def with_scales(weight: QTensor, dtype: torch.dtype) -> QTensor:
    """The weight with scales rounded to ``dtype``, and unchanged codes."""
    return replace(weight, scale=weight.scale.to(dtype))


def on_grid(weight: QTensor, grid: Grid) -> QTensor | None:
    """The weight in codes of another grid, at least as fine: codes and zero points are shifted together.

    A symmetric grid takes asymmetric codes only if every zero point is in the middle, or leaves room.
    """
    if grid == weight.grid:
        return weight
    if not takes_codes(grid, weight.grid):
        return None
    codes = weight.codes.to(torch.int16)
    zero = torch.zeros_like(weight.scale, dtype=torch.int16) if weight.zero is None else weight.zero.to(torch.int16)
    if grid.symmetric:
        moved = _lowered(codes, zero, weight.tile)
        if int(moved.min()) < grid.qmin or int(moved.max()) > grid.qmax:
            return None
        return replace(weight, codes=moved.to(torch.int8), zero=None, grid=grid)
    # Signed codes and their zero point go up together, so that the lowest possible code is 0.
    up = -weight.grid.qmin
    codes, zero = codes + up, zero + up
    if weight.grid.steps > grid.steps and (int(codes.max()) > grid.qmax or int(zero.max()) > grid.qmax):
        return None
    return replace(weight, codes=codes.to(torch.uint8), zero=zero.to(torch.uint8), grid=grid)


def takes_codes(grid: Grid, of: Grid) -> bool:
    """Whether a grid may take the codes of another, as far as the two tell without the codes (``on_grid``)."""
    if grid == of:
        return True
    if grid.signed_scale or of.signed_scale:
        return False  # a negative scale means something else to every other grid
    return Zero.REAL not in (grid.zero, of.zero)  # a real minimum is a zero point of no other grid


def splits(weight: QTensor, tile: Tile) -> bool:
    """Whether tiles lie whole within those of a weight; its data may be missing (``split``)."""
    (rows, columns), (to_rows, to_columns) = weight.tile.size(weight.shape), tile.size(weight.shape)
    if (rows, columns) == (to_rows, to_columns):
        return True
    return rows % to_rows == 0 and columns % to_columns == 0 and tile.divides(weight.shape)


def split(weight: QTensor, tile: Tile) -> QTensor | None:
    """The weight in smaller tiles, each with the scale (and zero point) of the tile it lies in."""
    if tile.size(weight.shape) == weight.tile.size(weight.shape):
        return replace(weight, tile=tile)
    if not splits(weight, tile):
        return None
    (rows, columns), (to_rows, to_columns) = weight.tile.size(weight.shape), tile.size(weight.shape)
    scale = _repeated(weight.scale, rows // to_rows, columns // to_columns)
    zero = None if weight.zero is None else _repeated(weight.zero, rows // to_rows, columns // to_columns)
    return replace(weight, scale=scale, zero=zero, tile=tile)


def rows_of(weight: QTensor, rows: slice | Int[Tensor, " R"]) -> QTensor:
    """Some rows of a weight without outliers, each of which has tiles of its own."""
    zero = None if weight.zero is None else weight.zero[rows]
    return QTensor(weight.codes[rows], weight.scale[rows], zero, weight.grid, replace(weight.tile, out=1))


def difference(name: str, before: QTensor, after: QTensor, codes: bool = True) -> Difference:
    """The difference between two versions of a weight, both computed in float32."""
    was = before.dequantize(torch.float32)
    return Difference(name, codes, relative_error(was, after.dequantize(torch.float32)))


def described(weight: QTensor) -> str:
    """A weight in words, for a message: bits, zero, shape, tiles and outliers."""
    rows, columns = weight.tile.size(weight.shape)
    zero = {Zero.NONE: " symmetric", Zero.REAL: ""}.get(weight.grid.zero, " asymmetric")
    real = " with a real-valued zero" if weight.grid.zero is Zero.REAL else ""
    kept = 0 if weight.outlier_index is None else weight.outlier_index.numel()
    outliers = f", with {kept} outliers," if kept else ""
    shape = list(weight.shape)
    return f"a {weight.grid.bits}-bit{zero} weight{real} {shape} in tiles of {rows} x {columns}{outliers}"


@dataclass
class SquaredError:
    """The squared error of a weight that is compared a part at a time: ``|W - W'|^2``, and ``|W|^2``."""

    lost: float = 0.0
    norm: float = 0.0

    def add(self, before: Tensor, after: Tensor) -> None:
        """Take in one more part of the weight, in float32."""
        self.lost += float((before - after).double().square().sum())
        self.norm += float(before.double().square().sum())

    @property
    def relative(self) -> float:
        """``|W - W'|^2 / |W|^2``; 0 or infinity if W is all zeros."""
        return self.lost / self.norm if self.norm else (0.0 if not self.lost else float("inf"))


def relative_error(before: Tensor, after: Tensor) -> float:
    """The relative squared error ``|W - W'|^2 / |W|^2``; 0 or infinity if W is all zeros."""
    error = SquaredError()
    error.add(before, after)
    return error.relative


def _lowered(codes: Tensor, zero: Tensor, tile: Tile) -> Tensor:
    """Codes minus the zero point of their tile."""
    return whole(tiled(codes, tile) - zero[:, None, :, None], codes.shape)


def _repeated(per_tile: Tensor, down: int, along: int) -> Tensor:
    return per_tile.repeat_interleave(down, 0).repeat_interleave(along, 1)
