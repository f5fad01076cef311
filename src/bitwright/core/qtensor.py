"""QTensor: a quantized weight, and the only place where the affine formula stands.

    h = (high - low) / (2**bits - 1)        rounded to the dtype it is stored in
    z = round(-low / h)                     an integer of the weight's own bits (asymmetric)
    code = clamp(round(W / h) + z, qmin, qmax)
    W ~ (code - z) * h                      or, with a real minimum m, W ~ code * h + m

(OmniQuant, arXiv 2308.13137, eq. 2, with low = beta*min(W), high = gamma*max(W).) A range always contains
zero, so that z fits in the weight's own bits. A symmetric grid takes the range [-r, r], r = max(-low, high),
and z = 0. If the minimum m = -z h is what is stored, rounded to float16, or m is any real number, the lower end of the
range, all weights of a tile are moved by m + z h, z being the nearest integer: what remains is the formula above.
With a signed scale h is the least that leaves no weight of the range further than h/2 from its code, and
negative where low is the further end, so that the extra code is spent there. Letters: O output features, I input
features, P and Q the tiles along each, K outliers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import overload

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from bitwright.core.grid import Grid, Tile, Zero

WORD_BITS, OUTLIER_INDEX_BITS = 32, 32
MINIMUM = torch.float16
"""What a minimum is stored in."""


@dataclass(frozen=True)
class QTensor:
    """A weight as codes, scales and zero points; exact at its outliers.

    ``codes`` are uint8 on an asymmetric grid and int8 on a symmetric one; ``scale`` is in the dtype it is stored in,
    and positive but on a grid of signed scales. ``zero`` is uint8 like the codes, the minimum in the scale's dtype if
    the grid has a real one, and None on a symmetric grid. ``outlier_index`` counts positions in row-major order.
    """

    codes: Int[Tensor, "O I"]
    scale: Float[Tensor, "P Q"]
    zero: Shaped[Tensor, "P Q"] | None
    grid: Grid
    tile: Tile
    outlier_index: Int[Tensor, " K"] | None = None
    outlier_value: Float[Tensor, " K"] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Output and input features."""
        return (self.codes.shape[0], self.codes.shape[1])

    @property
    def storage_bits(self) -> int:
        """Bits that this weight takes once it is packed: ``packed_bits``."""
        outliers = 0 if self.outlier_index is None else self.outlier_index.numel()
        return packed_bits(self.shape, self.grid, self.tile, self.scale.dtype, outliers)

    @property
    def bits_per_weight(self) -> float:
        """True bits per weight: everything stored, over the number of weights."""
        return self.storage_bits / self.codes.numel()

    def cuts(self, weight: Float[Tensor, "O I"]) -> bool:
        """Whether some of the weight is beyond what scales of this dtype stand for, and has been cut off there."""
        furthest = max(-self.grid.qmin, self.grid.qmax) * self.scale.abs().max().double()
        most = torch.finfo(self.scale.dtype).max
        return bool(furthest > most / 2) and bool(weight.abs().max() > most)

    def dequantize(self, dtype: torch.dtype | None = None) -> Float[Tensor, "O I"]:
        """The weight [O, I] that these codes stand for, computed in ``dtype`` (default: the scales' own)."""
        dtype = dtype or self.scale.dtype
        if self.grid.zero is Zero.PRODUCT and self.zero is not None:
            minimum = (-self.zero.float() * self.scale.float()).to(MINIMUM)
            weight = dequantize(self.codes, self.scale, minimum, self.tile).to(dtype)
        elif self.grid.zero is Zero.REAL:
            weight = dequantize(self.codes, self.scale, self.zero, self.tile).to(dtype)
        else:
            weight = dequantize(self.codes, self.scale.to(dtype), self.zero, self.tile)
        if self.outlier_index is not None and self.outlier_value is not None:
            weight.view(-1)[self.outlier_index.long()] = self.outlier_value.to(dtype)
        return weight

    @property
    def transposed(self) -> "QTensor":
        """The transposed weight [I, O], on the transposed tile."""
        index, values = self.outlier_index, self.outlier_value
        if index is not None and values is not None:
            rows, columns = self.shape
            moved = (index % columns) * rows + index // columns
            order = moved.argsort()
            index, values = moved[order].to(index.dtype), values[order]
        zero = None if self.zero is None else self.zero.mT.contiguous()
        codes, scale = self.codes.mT.contiguous(), self.scale.mT.contiguous()
        return QTensor(codes, scale, zero, self.grid, self.tile.transposed, index, values)

    @classmethod
    def of_rows(cls, parts: Sequence["QTensor"]) -> "QTensor":
        """Join weights that lie below one another to one; none of them may cut a tile of another."""
        first, *more = parts
        if not more:
            return first
        index, value = _outliers_below(parts)
        zeros = [part.zero for part in parts if part.zero is not None]
        return cls(
            torch.cat([part.codes for part in parts]),
            torch.cat([part.scale for part in parts]),
            torch.cat(zeros) if zeros else None,
            first.grid,
            first.tile,
            index,
            value,
        )


def _outliers_below(parts: Sequence[QTensor]) -> tuple[Int[Tensor, " K"] | None, Float[Tensor, " K"] | None]:
    """Positions and values of all parts' outliers in the whole; None if no part has any."""
    indices, values, before = [], [], 0
    for part in parts:
        if part.outlier_index is not None and part.outlier_value is not None:
            indices.append(part.outlier_index + before)
            values.append(part.outlier_value)
        before += part.codes.numel()
    return (torch.cat(indices), torch.cat(values)) if indices else (None, None)


def packed_bits(shape: tuple[int, int], grid: Grid, tile: Tile, dtype: torch.dtype, outliers: int = 0) -> int:
    """The bits that a packed weight [O, I] takes, everything counted but file headers.

    Scales and outliers are in ``dtype``, each outlier with its position. The codes of one row take whole words of 32
    bits, and so do the zero points of one column of tiles; a real minimum is kept as the scale is.
    """
    (rows, columns), (p, q) = shape, tile.counts(shape)
    words, numbers = rows * ceil(columns * grid.bits / WORD_BITS), p * q + outliers
    if grid.zero is Zero.REAL:
        numbers += p * q
    elif not grid.symmetric:
        words += q * ceil(p * grid.bits / WORD_BITS)
    return words * WORD_BITS + numbers * dtype.itemsize * 8 + outliers * OUTLIER_INDEX_BITS


def tiled(weight: Shaped[Tensor, "O I"], tile: Tile) -> Shaped[Tensor, "P To Q Ti"]:
    """The weight in tiles: dimensions 1 and 3 run inside one tile.

    It is a view, unless the last tile of a row is cut short: then it is a copy, filled up with zeros, which every range
    contains.
    """
    shape = (weight.shape[0], weight.shape[1])
    (p, q), (t_o, t_i) = tile.counts(shape), tile.size(shape)
    if q * t_i > shape[1]:
        weight = torch.nn.functional.pad(weight, (0, q * t_i - shape[1]))
    return weight.reshape(p, t_o, q, t_i)


def whole(tiles: Shaped[Tensor, "P To Q Ti"], shape: Sequence[int]) -> Shaped[Tensor, "O I"]:
    """The weight of this shape [O, I] behind its tiles; a view if nothing has to be moved."""
    return tiles.reshape(shape[0], -1)[:, : shape[1]].contiguous()


def affine(
    low: Float[Tensor, "P Q"], high: Float[Tensor, "P Q"], grid: Grid, dtype: torch.dtype
) -> tuple[Float[Tensor, "P Q"], Shaped[Tensor, "P Q"] | None]:
    """Scale (in ``dtype``) and zero of each tile for the range [low, high] of its weights.

    The scale is rounded to the dtype it is stored in before the zero point (and any code) is computed.
    A tile whose range is empty, all zeros, gets the scale 1. Only a range on a grid with a real minimum need not
    contain zero; the minimum is its lower end.
    """
    low, high = low.float(), high.float()
    if grid.zero is not Zero.REAL:
        low, high = low.clamp(max=0), high.clamp(min=0)
    step = _step(low, high, grid)
    finfo = torch.finfo(dtype)
    smallest = max(finfo.tiny * finfo.eps, torch.finfo(torch.float32).tiny)  # float16 needs its subnormal numbers
    furthest = max(-grid.qmin, grid.qmax)  # no code may stand for more than the dtype holds
    stored = step.abs().clamp(min=smallest, max=finfo.max / furthest * (1 - finfo.eps)).copysign(step).to(dtype)
    scale = torch.where(step.abs() > 0, stored, torch.ones_like(stored))
    if grid.symmetric:
        return scale, None
    if grid.zero is Zero.REAL:
        return scale, low.to(dtype)
    return scale, (-low / scale.float()).round().clamp(grid.qmin, grid.qmax).to(torch.uint8)


def offset(scale: Float[Tensor, "*P"], zero: Shaped[Tensor, "*P"] | None, grid: Grid) -> Float[Tensor, "*P"] | None:
    """How far the minimum moves the weights of a tile from an integer zero point, m + z h in float32; None: not at all.

    Rounding a weight on such a grid is rounding the weight less this on the ordinary one, with ``integer_zero``.
    """
    if zero is None or grid.zero not in (Zero.PRODUCT, Zero.REAL):
        return None
    if grid.zero is Zero.REAL:
        return zero.float() + integer_zero(scale, zero, grid).float() * scale.float()
    exact = zero.float() * scale.float()
    return exact - exact.to(MINIMUM).float()


@overload
def integer_zero(scale: Float[Tensor, "*P"], zero: Shaped[Tensor, "*P"], grid: Grid) -> Shaped[Tensor, "*P"]: ...
@overload
def integer_zero(scale: Float[Tensor, "*P"], zero: None, grid: Grid) -> None: ...
def integer_zero(
    scale: Float[Tensor, "*P"], zero: Shaped[Tensor, "*P"] | None, grid: Grid
) -> Shaped[Tensor, "*P"] | None:
    """The zero point, or the whole number of steps nearest to a real minimum; None on a symmetric grid."""
    if zero is None or grid.zero is not Zero.REAL:
        return zero
    return (-zero.float() / scale.float()).round().clamp(grid.qmin, grid.qmax)


def reach(
    low: Float[Tensor, "P Q"], high: Float[Tensor, "P Q"], grid: Grid
) -> tuple[float | Float[Tensor, "P Q"], float | Float[Tensor, "P Q"]]:
    """How many steps of a symmetric grid the ends of a range, low <= 0 <= high, may be from zero.

    The step is low or high over that, whichever is the larger.
    """
    first, last = grid.reach
    if not grid.signed_scale:
        return first, last
    mirrored, ends = -low > high, low.new_tensor([first, last])
    return torch.where(mirrored, ends[1], ends[0]), torch.where(mirrored, ends[0], ends[1])


def span(
    scale: Float[Tensor, "*P"], zero: Shaped[Tensor, "*P"] | None, grid: Grid
) -> tuple[Float[Tensor, "*P"], Float[Tensor, "*P"]]:
    """The range [low, high], in float32, for which ``affine`` gives this scale and zero.

    ``zero`` is what the grid has: None, a zero point (a code), or the minimum m of a real-valued zero. A paper's real
    zero in units of codes, W ~ (code - z) h, is m = -z h.
    """
    scale = scale.float()  # in a short dtype the ends would be rounded, and give another scale
    if zero is None:
        ends = grid.reach[0] * scale, grid.reach[1] * scale
        return torch.minimum(*ends), torch.maximum(*ends)
    if grid.zero is Zero.REAL:
        return zero.to(scale), zero.to(scale) + grid.steps * scale
    return -zero.to(scale) * scale, (grid.steps - zero.to(scale)) * scale


def _step(low: Float[Tensor, "P Q"], high: Float[Tensor, "P Q"], grid: Grid) -> Float[Tensor, "P Q"]:
    """h before it is rounded to the dtype it is stored in."""
    if grid.symmetric:
        below, above = reach(low, high, grid)
        by_low, by_high = low / below, high / above
        return by_low.where(by_low.abs() > by_high.abs(), by_high)
    step = (high - low) / grid.steps
    far = high / grid.steps - low / grid.steps  # both ends near the largest float32
    return torch.where(step.isfinite(), step, far)


def quantize(
    weight: Float[Tensor, "O I"],
    scale: Float[Tensor, "P Q"],
    zero: Shaped[Tensor, "P Q"] | None,
    grid: Grid,
    tile: Tile,
) -> Int[Tensor, "O I"]:
    """Codes of a weight, rounded to nearest (ties to even) in float32."""
    tiles, moved = tiled(weight.float(), tile), offset(scale, zero, grid)
    if moved is not None:
        tiles = tiles - _spread(moved)
    codes = (tiles / _spread(scale.float())).round_()
    if zero is not None:
        codes += _spread(integer_zero(scale, zero, grid).float())
    codes.clamp_(grid.qmin, grid.qmax)
    return whole(codes.to(torch.int8 if grid.symmetric else torch.uint8), weight.shape)


def dequantize(
    codes: Int[Tensor, "O I"], scale: Float[Tensor, "P Q"], zero: Shaped[Tensor, "P Q"] | None, tile: Tile
) -> Float[Tensor, "O I"]:
    """The weights that codes stand for: ``(codes - zero) * scale`` in the dtype of ``scale``.

    If zero is a real number, the minimum, they are ``codes * scale + zero``, in float32.
    """
    if zero is not None and zero.is_floating_point():
        weight = tiled(codes, tile).float() * _spread(scale.float()) + _spread(zero.float())
        return whole(weight, codes.shape)
    values = tiled(codes, tile).to(scale.dtype)
    if zero is not None:
        values -= _spread(zero.to(scale.dtype))
    return whole(values * _spread(scale), codes.shape)


def _spread(per_tile: Shaped[Tensor, "P Q"]) -> Shaped[Tensor, "P 1 Q 1"]:
    return per_tile[:, None, :, None]
