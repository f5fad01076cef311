"""GPTQ's rounding against the procedure it was derived from, written out, and against what it claims."""

import pytest
import torch
from torch import Tensor

from bitwright.core.grid import Grid, Tile
from bitwright.core.method import Moments
from bitwright.core.qtensor import affine, dequantize, quantize
from bitwright.core.scheme import Scheme
from bitwright.steps.ranges import minmax
from bitwright.steps.rounding import DAMPING, Ranges, compensated, curvature, making_good

GENERATOR = torch.Generator().manual_seed(3)
INPUTS = torch.randn(500, 48, generator=GENERATOR) @ torch.randn(48, 48, generator=GENERATOR)
HESSIAN = INPUTS.T @ INPUTS / len(INPUTS)
CURVATURE = curvature(HESSIAN)
WEIGHT = torch.randn(16, 48, generator=GENERATOR) / 7
TILES = [Tile(1, -1), Tile(1, 16), Tile(8, 1), Tile(16, 48)]


def known(weight: Tensor, grid: Grid, tile: Tile) -> Ranges:
    return Ranges(weight, minmax(weight, tile), grid, tile, torch.float32)


def codes_one_weight_at_a_time(
    weight: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid, tile: Tile, updated: bool = False
) -> Tensor:
    """Optimal Brain Quantization's own update (GPTQ, eq. 2 and 3), in float64: the inverse of the Hessian of what is
    left is made anew after every column, by Gaussian elimination of that column."""
    w, h = weight.double().clone(), HESSIAN.double()
    h = h + DAMPING * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    inverse, left = torch.linalg.inv(h), torch.argsort(HESSIAN.diagonal(), descending=True).tolist()
    rows, columns = tile.size((weight.shape[0], weight.shape[1]))
    codes = torch.zeros(weight.shape, dtype=torch.int64)
    for j in left:
        if updated:
            ends = [f(w[:, j].float().view(-1, rows), 1) for f in (torch.amin, torch.amax)]
            updated_scale, point = affine(ends[0][:, None], ends[1][:, None], grid, torch.float32)
            scale[:, j] = updated_scale[:, 0]
            if zero is not None and point is not None:
                zero[:, j] = point[:, 0]
        for row in range(len(w)):
            step = float(scale[row // rows, j // columns])
            z = 0 if zero is None else int(zero[row // rows, j // columns])
            code = min(max(round(float(w[row, j]) / step) + z, grid.qmin), grid.qmax)
            codes[row, j] = code
            w[row] -= (float(w[row, j]) - (code - z) * step) / inverse[j, j] * inverse[j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("text", ["W2A16", "W3A16", "W4A16sym"])
def test_codes_are_those_of_the_procedure_written_out(text: str, tile: Tile) -> None:
    grid = Scheme.parse(text).weight
    scale, zero = affine(*minmax(WEIGHT, tile), grid, torch.float32)
    found = compensated(WEIGHT, known(WEIGHT, grid, tile), CURVATURE)
    assert CURVATURE.fallback is None
    assert torch.equal(found.long(), codes_one_weight_at_a_time(WEIGHT, scale, zero, grid, tile))


@pytest.mark.parametrize("text", ["W2A16", "W3A16", "W4A16"])
def test_groups_within_a_column_take_their_scale_from_the_column_as_updated(text: str) -> None:
    """AdaDim's GPTQ, written out. (On a symmetric grid the largest of a column lies between two codes, always.)"""
    grid, tile = Scheme.parse(text).weight, Tile(8, 1)
    scale, zero = affine(*minmax(WEIGHT, tile), grid, torch.float32)
    ranges = Ranges(WEIGHT, None, grid, tile, torch.float32)
    found = compensated(WEIGHT, ranges, CURVATURE)
    wanted = codes_one_weight_at_a_time(WEIGHT, scale, zero, grid, tile, updated=True)
    assert torch.equal(found.long(), wanted)
    torch.testing.assert_close(affine(ranges.low, ranges.high, grid, torch.float32)[0], scale)
    assert not torch.equal(found, compensated(WEIGHT, known(WEIGHT, grid, tile), CURVATURE))


def test_columns_in_another_order_and_more_damping_give_other_codes() -> None:
    grid, tile = Scheme.parse("W3A16").weight, Tile(1, 16)
    plain = compensated(WEIGHT, known(WEIGHT, grid, tile), CURVATURE)
    rounded = quantize(WEIGHT, *affine(*minmax(WEIGHT, tile), grid, torch.float32), grid, tile)
    assert not torch.equal(plain, compensated(WEIGHT, known(WEIGHT, grid, tile), curvature(HESSIAN, act_order=False)))
    damped = compensated(WEIGHT, known(WEIGHT, grid, tile), curvature(HESSIAN, damping=1.0))
    assert (damped != rounded).sum() < (plain != rounded).sum()


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_a_larger_weight_error_and_a_smaller_output_error_than_rounding_to_nearest(tile: Tile) -> None:
    """The claim of the paper."""
    grid = Scheme.parse("W3A16").weight
    scale, zero = affine(*minmax(WEIGHT, tile), grid, torch.float32)
    found = compensated(WEIGHT, known(WEIGHT, grid, tile), CURVATURE)
    nearest = quantize(WEIGHT, scale, zero, grid, tile)
    gptq, rtn = (WEIGHT - dequantize(codes, scale, zero, tile) for codes in (found, nearest))
    assert gptq.norm() > rtn.norm()
    assert (INPUTS @ gptq.T).norm() < 0.8 * (INPUTS @ rtn.T).norm()


def test_the_error_before_is_made_good() -> None:
    """Rounded for what it will read, the linear is nearer to the original on what that read."""
    grid, tile = Scheme.parse("W3A16").weight, Tile(1, 16)
    read = INPUTS + 0.3 * INPUTS.roll(1, dims=1)
    moments = Moments(read.T @ read / len(read), (INPUTS - read).T @ read / len(read), len(read))
    wanted = making_good(WEIGHT, moments, curvature(moments.inputs))
    best = torch.linalg.lstsq(read.double(), INPUTS.double() @ WEIGHT.T.double()).solution.T
    assert (wanted - best).norm() < 0.4 * (WEIGHT - best).norm()  # H is damped
    scale, zero = affine(*minmax(WEIGHT, tile), grid, torch.float32)
    errors = []
    for weight in (WEIGHT, wanted):
        codes = compensated(weight, known(WEIGHT, grid, tile), curvature(moments.inputs))
        errors.append((INPUTS @ WEIGHT.T - read @ dequantize(codes, scale, zero, tile).T).norm())
    assert errors[1] < 0.8 * errors[0]
    assert torch.equal(making_good(WEIGHT, Moments(moments.inputs, torch.zeros(48, 48), len(read)), CURVATURE), WEIGHT)


def test_lazy_batches_change_nothing() -> None:
    """Wider than one batch, against the procedure written out."""
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(900, 300, generator=generator)
    weight, hessian, grid, tile = (
        torch.randn(8, 300, generator=generator),
        inputs.T @ inputs / 900,
        Grid.integers(3),
        Tile(1, -1),
    )
    scale, zero = affine(*minmax(weight, tile), grid, torch.float32)
    curved = curvature(hessian)
    found, order, factor = compensated(weight, known(weight, grid, tile), curved), curved.order, curved.factor
    w = weight[:, order].clone()
    for j in range(300):
        code = quantize(w[:, j : j + 1], scale, zero, grid, tile)
        error = (w[:, j : j + 1] - dequantize(code, scale, zero, tile)) / factor[j, j]
        w[:, j:] -= error * factor[j, j:]
        assert (code[:, 0] == found[:, order[j]]).float().mean() > 0.8, j  # float32: a weight may fall to either side


def test_inputs_that_never_come_and_a_matrix_that_is_not_positive_definite() -> None:
    dead = HESSIAN.clone()
    dead[5] = dead[:, 5] = 0
    assert curvature(dead).fallback is None
    shifted = HESSIAN - 0.05 * HESSIAN.diagonal().mean() * torch.eye(48)
    damped = curvature(shifted)
    assert damped.fallback is not None and "damping" in damped.fallback and damped.factor.isfinite().all()
    said = curvature(torch.full((48, 48), float("nan"))).fallback
    assert said is not None and "nearest" in said


def test_the_diagonal_alone_is_rounding_to_nearest() -> None:
    grid, tile = Scheme.parse("W3A16").weight, Tile(1, 16)
    scale, zero = affine(*minmax(WEIGHT, tile), grid, torch.float32)
    unusable = curvature(torch.full((48, 48), float("nan")))
    found = compensated(WEIGHT, known(WEIGHT, grid, tile), unusable)
    assert unusable.inverse is None and torch.equal(found, quantize(WEIGHT, scale, zero, grid, tile))
