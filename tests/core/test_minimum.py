"""Grids whose minimum is stored in the place of the zero point, rounded to float16: codes belong to what is stored."""

import numpy as np
import pytest
import torch

from bitwright.core.decisions import LinearDecision
from bitwright.core.errors import SchemeError
from bitwright.core.fake_quant import fake_quantize
from bitwright.core.grid import Q4_1, Grid, Levels, Tile, Zero
from bitwright.core.qtensor import QTensor, affine
from bitwright.core.scheme import Scheme
from bitwright.steps.apply import quantize_linear
from bitwright.steps.ranges import minmax
from bitwright.steps.rounding import Ranges, compensated, curvature

GRID, TILE = Q4_1, Tile(1, 32)


def weight(rows: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, 96, generator=generator) * 0.3 + torch.randn(rows, 1, generator=generator) * 0.4


def stored(q: QTensor) -> tuple[np.ndarray, np.ndarray]:
    """Scale and minimum of every weight, in float64, worked out apart from Bitwright."""
    assert q.zero is not None
    scale = q.scale.numpy().astype(np.float64).repeat(32, 1)
    minimum = (-q.zero.numpy().astype(np.float64).repeat(32, 1) * scale).astype(np.float16)
    return scale, minimum.astype(np.float64)


def test_every_code_is_the_nearest_of_all_as_they_will_be_computed() -> None:
    w = weight()
    q = quantize_linear(w, LinearDecision(), Scheme(GRID, TILE), torch.float16)
    scale, minimum = stored(q)
    levels = np.arange(16)[:, None, None] * scale + minimum
    exact = w.double().numpy()
    chosen = np.abs(q.codes.numpy() * scale + minimum - exact)
    assert (chosen <= np.abs(levels - exact).min(0) + 1e-7).all()
    assert q.zero is not None
    assert np.abs(minimum + q.zero.numpy().repeat(32, 1) * scale).max() > 0  # the rounding is there


def test_the_weight_is_what_scale_and_minimum_make() -> None:
    q = quantize_linear(weight(), LinearDecision(), Scheme(GRID, TILE), torch.float16)
    scale, minimum = (each.astype(np.float32) for each in stored(q))
    np.testing.assert_array_equal(q.dequantize(torch.float32).numpy(), q.codes.numpy() * scale + minimum)
    np.testing.assert_array_equal(q.dequantize(), q.dequantize(torch.float32).half())


def test_training_passes_through_the_same_weights() -> None:
    w = weight()
    q = quantize_linear(w, LinearDecision(), Scheme(GRID, TILE), torch.float16)
    made = fake_quantize(w, *minmax(w, TILE), GRID, TILE, torch.float16)
    torch.testing.assert_close(made, q.dequantize(torch.float32), rtol=1e-6, atol=1e-7)


def test_errors_that_gptq_moves_on_are_those_of_what_is_stored() -> None:
    """With every column's error moved on to the next one in full, the sum of each row is kept as far as codes reach."""
    w = weight(16)
    found = curvature(torch.eye(96))
    ranges = Ranges(w, None, GRID, TILE, torch.float16)
    codes = compensated(w, ranges, found)
    scale, zero = affine(*minmax(w, TILE), GRID, torch.float16)
    rounded = quantize_linear(w, LinearDecision(), Scheme(GRID, TILE), torch.float16)
    assert torch.equal(codes, rounded.codes)  # nothing to make good: rounding to nearest
    one = torch.full((96, 96), 0.999) + 0.001 * torch.eye(96)  # all inputs alike: only the sum of a row counts
    moved = QTensor(compensated(w, ranges, curvature(one, damping=1e-6)), scale, zero, GRID, TILE)
    lost = (moved.dequantize(torch.float32).double() - w.double()).sum(1).abs()
    assert (lost <= scale.double().amax(1) * 0.51).all()


def test_a_symmetric_grid_has_none() -> None:
    with pytest.raises(SchemeError, match="no zero point"):
        Grid(Levels(-8, 7), zero=Zero.PRODUCT)
