"""The rounding decision of GPTQ (arXiv 2210.17323): later weights compensate the rounding errors of earlier ones.

Columns of W are rounded in turn, and the error of a column moves into the columns still to come, so that
|| (W - Wq) X' ||^2 stays small. With H = E[x' x'^T] and U the upper Cholesky factor of its inverse, H^-1 = U^T U:

    e_j = (w_j - wq_j) / U_jj,        w_k <- w_k - e_j U_jk   for k > j
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bitwright.core.grid import Grid, Tile
from bitwright.core.method import Moments, Range
from bitwright.core.qtensor import affine, integer_zero, offset, quantize
from bitwright.steps.ranges import minmax, nearest_to_weights

DAMPING, HARDER, TRIES, LAZY = 0.01, 10.0, 4, 128
SINGLE = Tile(1, 1)
Steps = tuple[Float[Tensor, "O Q"], Int[Tensor, "O Q"] | None]
"""Scales and zero points, one for each row of each tile."""


class Ranges:
    """The range of each tile while columns are rounded in turn.

    Ranges that are known before stay (static groups). Otherwise they are min-max of the weight before rounding. But
    tiles within one column take min-max of the column as updated so far (AdaDim, arXiv 2309.15531). With ``search``
    they take the range that loses least, which is the best: all weights of a column are rounded at once and count
    equally.
    """

    def __init__(
        self,
        weight: Float[Tensor, "O I"],
        known: Range | None,
        grid: Grid,
        tile: Tile,
        dtype: torch.dtype,
        search: bool = False,
    ) -> None:
        """``known`` are ranges decided before; ``dtype`` is the dtype that scales are stored in."""
        self.rows, self.columns = tile.size((weight.shape[0], weight.shape[1]))
        self.updated, self.search = known is None and self.columns == 1, search
        self.low, self.high = (end.clone() for end in (minmax(weight, tile) if known is None else known))
        self.grid, self.dtype = grid, dtype
        self._steps = self._spread(self.low, self.high)

    def of(self, j: int, column: Float[Tensor, "O 1"]) -> Steps:
        """Scale and zero point of every weight of column ``j``; ``column`` are its values as updated so far."""
        q = slice(j // self.columns, j // self.columns + 1)
        if not self.updated:
            scale, zero = self._steps
            return scale[:, q], None if zero is None else zero[:, q]
        tile = Tile(self.rows, 1)
        low, high = nearest_to_weights(column, self.grid, tile, self.dtype) if self.search else minmax(column, tile)
        self.low[:, q], self.high[:, q] = low, high
        return self._spread(low, high)

    def _spread(self, low: Float[Tensor, "P Q"], high: Float[Tensor, "P Q"]) -> Steps:
        scale, zero = affine(low, high, self.grid, self.dtype)
        rows = scale.float().repeat_interleave(self.rows, 0)
        return rows, None if zero is None else zero.repeat_interleave(self.rows, 0)


@dataclass(frozen=True)
class Curvature:
    """The inverse of H and its factor, computed once for all linears that share H.

    ``order`` is the order in which columns are rounded; ``factor`` is U in that order, upper triangular, with
    (H + damping)^-1 = U^T U. ``inverse`` is (H + damping)^-1 in the order of the weight, None if H was not usable.
    ``fallback`` says what was done instead of the usual.
    """

    order: Int[Tensor, " I"]
    factor: Float[Tensor, "I I"]
    inverse: Float[Tensor, "I I"] | None
    fallback: str | None


@torch.no_grad()
def curvature(hessian: Float[Tensor, "I I"], *, damping: float = DAMPING, act_order: bool = True) -> Curvature:
    """Damp and invert H, in float64; columns are ordered by its falling diagonal if ``act_order``.

    An input that was always zero has no influence. A matrix that is not positive definite is damped ten times harder,
    three times at most. After that only its diagonal is used, which is rounding to nearest. ``fallback`` reports both.
    """
    h = hessian.double()
    diagonal = h.diagonal()
    diagonal[diagonal <= 0] = 1.0
    order = torch.argsort(hessian.diagonal(), descending=True) if act_order else torch.arange(len(h), device=h.device)
    mean, share = diagonal.mean(), damping
    for attempt in range(TRIES):
        lower, failed = torch.linalg.cholesky_ex(h + share * mean * torch.eye(len(h), dtype=h.dtype, device=h.device))
        if not failed and lower.isfinite().all():
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse[order][:, order], upper=True)
            if not failed and upper.isfinite().all():
                fallback = (
                    f"Hessian not positive definite: damping {share:g} instead of {damping:g}" if attempt else None
                )
                return Curvature(order, upper.float(), inverse.float(), fallback)
        share *= HARDER
    alone = torch.diag(diagonal[order].rsqrt().nan_to_num(nan=1.0)).float()
    return Curvature(order, alone, None, "Hessian unusable: rounded to nearest instead")


@torch.no_grad()
def compensated(
    weight: Float[Tensor, "O I"],
    ranges: Ranges,
    solved: Curvature,
    kept: tuple[Bool[Tensor, "O I"], Float[Tensor, "O I"]] | None = None,
) -> Int[Tensor, "O I"]:
    """Round a weight to codes, moving the error of each column on; ``ranges`` then holds the ranges of the codes.

    ``kept`` are the weights that get no code, and the values that they keep whatever error moves to them. Updates reach
    the columns outside of a batch of 128 only at its end (lazy batches), which does not change the result.
    """
    columns, factor, at = weight.shape[1], solved.factor, solved.order.tolist()
    w = weight.float()[:, solved.order].clone()
    codes = torch.empty_like(w, dtype=torch.int8 if ranges.grid.symmetric else torch.uint8)
    for start in range(0, columns, LAZY):
        end = min(start + LAZY, columns)
        errors = torch.empty_like(w[:, start:end])
        for j in range(start, end):
            column = w[:, j : j + 1]
            here = slice(at[j], at[j] + 1)
            inside = column if kept is None else column.masked_fill(kept[0][:, here], 0.0)
            h, z = ranges.of(at[j], inside)
            codes[:, j : j + 1] = quantize(inside, h, z, ranges.grid, SINGLE)
            zero = integer_zero(h, z, ranges.grid)
            levels = codes[:, j : j + 1].float() if zero is None else codes[:, j : j + 1].float() - zero.float()
            stands, moved = levels * h, offset(h, z, ranges.grid)
            if moved is not None:
                stands += moved
            if kept is not None:
                stands = kept[1][:, here].where(kept[0][:, here], stands)
            errors[:, j - start] = ((column - stands) / factor[j, j])[:, 0]
            w[:, j:end] -= errors[:, j - start, None] * factor[j, j:end]
        w[:, end:] -= errors @ factor[start:end, end:]
    return codes[:, torch.argsort(solved.order)]


@torch.no_grad()
def making_good(weight: Float[Tensor, "O I"], moments: Moments, solved: Curvature) -> Float[Tensor, "O I"]:
    """The weight whose output on the quantized linear's inputs X' is nearest to W X: W + W C H^-1.

    Rounding it instead of W compensates the errors that earlier quantized linears left in X'. If H has no usable
    inverse, the result is W.
    """
    if solved.inverse is None or not moments.drift.any():
        return weight
    moved = weight + (weight @ moments.drift) @ solved.inverse
    return moved if moved.isfinite().all() else weight
