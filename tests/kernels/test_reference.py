"""The reference kernel has exactly the values of QTensor.dequantize, whatever the tile, and never the whole weight."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bitwright.core.decisions import LinearDecision
from bitwright.core.errors import SchemeError
from bitwright.core.fake_quant import fake_quantize_tokens
from bitwright.core.grid import FULL, Grid, Tile
from bitwright.core.qtensor import QTensor
from bitwright.core.scheme import Scheme
from bitwright.formats import bitwright as format
from bitwright.kernels import reference
from bitwright.kernels.reference import PackedLinear
from bitwright.steps.apply import quantize_linear

GRIDS = [Grid.integers(bits, symmetric) for bits in range(2, 9) for symmetric in (False, True)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
TILES = [Tile(1, FULL), Tile(1, 8), Tile(36, 1), Tile(FULL, 1), Tile(FULL, FULL), Tile(9, 8), Tile(2, FULL)]


def some(shape: tuple[int, int], grid: Grid, tile: Tile, dtype: torch.dtype, outliers: int = 0) -> QTensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    kept = torch.zeros(shape[0] * shape[1], dtype=torch.bool)
    kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(4))[:outliers]] = True
    decided = LinearDecision(outliers=kept.view(shape) if outliers else None)
    return quantize_linear(weight, decided, Scheme(grid, tile), dtype)


def packed(q: QTensor, **also: Any) -> PackedLinear:
    outliers = 0 if q.outlier_index is None else q.outlier_index.numel()
    linear = PackedLinear(q.shape, q.grid, q.tile, q.scale.dtype, outliers=outliers, **also)
    tensors = {name.removeprefix("x."): tensor for name, tensor in format.encode("x", q).items()}
    missing = linear.load_state_dict(tensors, strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"bias"}
    return linear


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_grid_and_tile_bit_for_bit(grid: Grid, tile: Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    q = some((72, 40), grid, tile, torch.bfloat16, outliers=50)
    for slab in (1, 40 * 5, 40 * 36, 2**20):  # a row at a time, slabs that cut tiles and runs, the whole weight
        monkeypatch.setattr(reference, "SLAB_WEIGHTS", slab)
        assert torch.equal(packed(q).dequantize(), q.dequantize())


@settings(max_examples=80)
@given(
    st.tuples(st.integers(1, 5), st.integers(1, 40)), st.tuples(st.integers(1, 5), st.integers(1, 40)),
    st.sampled_from(GRIDS), st.sampled_from(DTYPES), st.integers(0, 3), st.data(),
)  # fmt: skip
def test_any_slab_of_any_weight(
    out: tuple[int, int], in_: tuple[int, int], grid: Grid, dtype: torch.dtype, outliers: int, data: st.DataObject
) -> None:
    shape, tile = (out[0] * out[1], in_[0] * in_[1]), Tile(out[0], in_[0])
    q = some(shape, grid, tile, dtype, outliers=min(outliers, shape[0] * shape[1]))
    start = data.draw(st.integers(0, shape[0] - 1))
    stop = data.draw(st.integers(start + 1, shape[0]))
    found = packed(q).rows(start, stop)
    assert found.dtype == dtype
    assert torch.equal(found, q.dequantize()[start:stop])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_is_that_of_a_linear(dtype: torch.dtype) -> None:
    q = some((48, 32), Grid.integers(3), Tile(16, 1), torch.bfloat16, outliers=5)
    bias = nn.Parameter(torch.linspace(-1, 1, 48, dtype=dtype))
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    want = nn.functional.linear(x, q.dequantize().to(dtype), bias)
    assert torch.equal(packed(q, bias=bias)(x), want)
    assert torch.equal(packed(q)(x), nn.functional.linear(x, q.dequantize().to(dtype)))


def test_inputs_are_quantized_per_token() -> None:
    q, x = some((16, 32), Grid.integers(4), Tile(1, FULL), torch.float32), torch.randn(3, 7, 32)
    want = nn.functional.linear(fake_quantize_tokens(x, Grid.integers(4)), q.dequantize())
    assert torch.equal(packed(q, activations=Grid.integers(4))(x), want)


def test_a_model_in_another_dtype_keeps_the_weights_values() -> None:
    q = some((32, 32), Grid.integers(4), Tile(32, 1), torch.bfloat16, outliers=3)
    assert torch.equal(packed(q).to(torch.float32).dequantize(), q.dequantize())


def test_no_more_than_a_slab_is_dequantized_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    original = PackedLinear.rows

    def rows(self: PackedLinear, start: int, stop: int) -> Tensor:
        weight = original(self, start, stop)
        made.append(weight.numel())
        return weight

    monkeypatch.setattr(PackedLinear, "rows", rows)
    monkeypatch.setattr(reference, "SLAB_WEIGHTS", 1000)
    q = some((96, 64), Grid.integers(4), Tile(32, 1), torch.float32)
    y = packed(q)(torch.randn(4, 64))
    assert y.shape == (4, 96)
    assert sum(made) == 96 * 64 and max(made) <= 1000


def test_a_tile_that_does_not_divide_is_refused() -> None:
    with pytest.raises(SchemeError, match="48 output features do not divide into groups of 32"):
        PackedLinear((48, 32), Grid.integers(4), Tile(32, 1), torch.float32)
