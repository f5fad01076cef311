"""Round to nearest through Bitwright, code by code against the independent implementation, on random weights."""

import numpy as np
import pytest
import torch
from tests.golden import affine

from bitwright.core.decisions import LinearDecision
from bitwright.core.grid import FULL, Grid, Tile
from bitwright.core.method import WeightContext
from bitwright.core.qtensor import QTensor
from bitwright.core.scheme import Scheme
from bitwright.core.settings import Settings
from bitwright.methods import rtn
from bitwright.steps.apply import quantize_linear

ROWS, COLUMNS = 24, 40
TILES = [(1, FULL), (1, 8), (8, 1), (FULL, FULL), (FULL, 1), (4, 10)]
DTYPES = ["bfloat16", "float16", "float32"]
ULPS_OF_FLOAT32 = 2.0**-22  # relative: two units in the last place, for the order of a division and a subtraction


def through_bitwright(weight: torch.Tensor, scheme: Scheme) -> QTensor:
    decided = rtn.METHOD.decide(weight.float(), WeightContext(Settings(), scheme, weight.dtype), LinearDecision())
    return quantize_linear(weight, decided, scheme, weight.dtype)


def drawn(dtype: str, seed: int) -> torch.Tensor:
    """Weights as they occur: most small, rows of different sizes, some of one sign, a few large, zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, COLUMNS, generator=generator) * torch.logspace(-1, 1, ROWS)[:, None]
    weight[3] = weight[3].abs()
    weight[4] = -weight[4].abs()
    weight[5, ::7] *= 30
    weight[6] = 0
    weight[7, 1:] = 0
    return weight.to(getattr(torch, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("bits", range(2, 9))
def test_code_by_code(bits: int, tile: tuple[int, int], symmetric: bool, dtype: str) -> None:
    weight = drawn(dtype, seed=bits)
    q = through_bitwright(weight, Scheme(Grid.integers(bits, symmetric), Tile(*tile)))
    scale = q.scale.double().numpy()
    exact = weight.double().numpy()
    golden = affine.quantize(exact, bits, symmetric, tile, dtype)
    if dtype == "float32":
        np.testing.assert_allclose(scale, golden.scale, rtol=ULPS_OF_FLOAT32)
        golden = affine.quantize(exact, bits, symmetric, tile, dtype, scale)
    np.testing.assert_array_equal(scale, golden.scale)
    np.testing.assert_array_equal(np.zeros_like(golden.zero) if q.zero is None else q.zero.numpy(), golden.zero)
    np.testing.assert_array_equal(q.codes.numpy(), golden.codes)
    np.testing.assert_array_equal(q.dequantize().double().numpy(), golden.values(dtype))


@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
def test_small_weights_in_float16(symmetric: bool) -> None:
    # A tile of 8 bits has a step below 2**-14 as soon as its range is below 0.0156: nothing unusual in a model.
    weight = (drawn("float32", seed=1) * 0.002).half()
    exact = weight.double().numpy()
    q = through_bitwright(weight, Scheme(Grid.integers(8, symmetric), Tile(1, 8)))
    golden = affine.quantize(exact, 8, symmetric, (1, 8), "float16")
    error, least = (np.abs(each - exact).sum() for each in (q.dequantize().double().numpy(), golden.values("float16")))
    assert error < 1.05 * least


def test_dtypes_of_what_is_stored() -> None:
    weight = drawn("bfloat16", seed=0)
    asymmetric, symmetric = (through_bitwright(weight, Scheme(Grid.integers(4, sym))) for sym in (False, True))
    assert (asymmetric.codes.dtype, symmetric.codes.dtype) == (torch.uint8, torch.int8)
    assert asymmetric.zero is not None and asymmetric.zero.dtype == torch.uint8
    assert symmetric.zero is None
    assert asymmetric.scale.dtype == symmetric.scale.dtype == torch.bfloat16
