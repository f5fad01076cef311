"""The rounding decision: which code each weight gets when later weights make good the errors of earlier ones.

GPTQ (arXiv 2210.17323): columns of W are rounded in turn, and what a column loses moves into the columns still to
come, so that || (W - Wq) X' ||^2 stays small; with H = E[x' x'^T] and U the upper Cholesky factor of its inverse,
H^-1 = U^T U:

    e_j = (w_j - wq_j) / U_jj,        w_k <- w_k - e_j U_jk   for k > j
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitwright.core.method import Moments
from bitwright.core.qtensor import quantize
from bitwright.core.scheme import Grid, Tile

DAMPING, HARDER, TRIES, LAZY = 0.01, 10.0, 4, 128


@torch.no_grad()
def compensated(
    weight: Float[Tensor, "O I"],
    scale: Float[Tensor, "P Q"],
    zero: Int[Tensor, "P Q"] | None,
    grid: Grid,
    tile: Tile,
    hessian: Float[Tensor, "I I"],
) -> tuple[Int[Tensor, "O I"], str | None]:
    """Codes of a weight, its error moved on column by column; and the fallback that was taken, in words.

    Columns go by falling diagonal of H (act-order), each with the scale its tile has from the start (static groups).
    Their updates reach the columns outside of a batch of 128 only at its end (lazy batches), which changes nothing.
    """
    order = torch.argsort(hessian.diagonal(), descending=True)
    factor, fallback = factor_of_inverse(hessian[order][:, order])
    w = weight.float()[:, order].clone()
    rows, columns = tile.size((weight.shape[0], weight.shape[1]))
    tile_of = order // columns
    steps = scale.float().repeat_interleave(rows, 0)
    zeros = None if zero is None else zero.repeat_interleave(rows, 0)
    codes = torch.empty_like(w, dtype=torch.int8 if grid.symmetric else torch.uint8)
    each = Tile(1, 1)
    for start in range(0, w.shape[1], LAZY):
        end = min(start + LAZY, w.shape[1])
        errors = torch.empty_like(w[:, start:end])
        for j in range(start, end):
            q = slice(int(tile_of[j]), int(tile_of[j]) + 1)
            h, z = steps[:, q], None if zeros is None else zeros[:, q]
            codes[:, j : j + 1] = quantize(w[:, j : j + 1], h, z, grid, each)
            levels = codes[:, j].float() if z is None else codes[:, j].float() - z[:, 0].float()
            errors[:, j - start] = (w[:, j] - levels * h[:, 0]) / factor[j, j]
            w[:, j:end] -= errors[:, j - start, None] * factor[j, j:end]
        w[:, end:] -= errors @ factor[start:end, end:]
    return codes[:, torch.argsort(order)], fallback


@torch.no_grad()
def making_good(weight: Float[Tensor, "O I"], moments: Moments) -> Float[Tensor, "O I"]:
    """The weight whose product with what the quantized linear reads, X', is nearest to W X: W + W C H^-1.

    Rounding it instead of W makes good what the quantized linears before have changed in X'. Where H has no usable
    inverse, W itself.
    """
    if not moments.drift.any():
        return weight
    upper, fallback = factor_of_inverse(moments.inputs)
    moved = weight + (weight @ moments.drift) @ (upper.T @ upper)
    return weight if fallback is not None or not moved.isfinite().all() else moved


def factor_of_inverse(hessian: Float[Tensor, "I I"]) -> tuple[Float[Tensor, "I I"], str | None]:
    """U with (H + damping)^-1 = U^T U, upper triangular.

    An input that was always zero has no say. A matrix that is not positive definite is damped ten times harder, four
    times at most; then only its diagonal is used, which is rounding to nearest. Either is said.
    """
    h = hessian.double()
    diagonal = h.diagonal()
    diagonal[diagonal <= 0] = 1.0
    mean, damping = diagonal.mean(), DAMPING
    for attempt in range(TRIES):
        lower, failed = torch.linalg.cholesky_ex(h + damping * mean * torch.eye(len(h), dtype=h.dtype, device=h.device))
        if not failed and lower.isfinite().all():
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and upper.isfinite().all():
                said = f"Hessian not positive definite: damping {damping:g} instead of {DAMPING:g}" if attempt else None
                return upper.float(), said
        damping *= HARDER
    return torch.diag(diagonal.rsqrt().nan_to_num(nan=1.0)).float(), "Hessian unusable: rounded to nearest instead"
