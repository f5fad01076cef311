"""Grids whose zero is a real number: by hand, with every method, and in every format that holds them."""

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from tests.conftest import Checkpoints

import bitwright
from bitwright.core.engine_file import Levels, unlike
from bitwright.core.errors import RecipeError
from bitwright.core.fake_quant import fake_quantize
from bitwright.core.grid import Grid, Tile, Zero
from bitwright.core.qtensor import QTensor, affine, packed_bits, quantize, span
from bitwright.core.recipe import Recipe
from bitwright.formats import awq, compressed_tensors, gguf, gptq
from bitwright.formats.gguf.weights import held
from bitwright.formats.mlc import presets

GRID, TILE = Grid.with_real_minimum(2), Tile(1, 4)


def made(weight: torch.Tensor, grid: Grid = GRID, tile: Tile = TILE) -> QTensor:
    """The weight rounded to nearest within min-max."""
    shape = (weight.shape[0], weight.shape[1])
    tiles = weight.view(tile.counts(shape)[0], tile.size(shape)[0], -1, tile.size(shape)[1])
    scale, zero = affine(tiles.amin((1, 3)), tiles.amax((1, 3)), grid, torch.float32)
    return QTensor(quantize(weight, scale, zero, grid, tile), scale, zero, grid, tile)


def test_by_hand() -> None:
    # Between 10 and 13, 2 bits: a step of 1 from 10 on. An integer zero point would need a range from 0 to 13.
    q = made(torch.tensor([[10.0, 11.2, 11.6, 13.0]]))
    assert q.codes.tolist() == [[0, 1, 2, 3]] and q.scale.tolist() == [[1.0]]
    assert q.zero is not None and q.zero.tolist() == [[10.0]]
    assert q.dequantize().tolist() == [[10.0, 11.0, 12.0, 13.0]]
    low, high = span(q.scale, q.zero, GRID)
    assert (low.tolist(), high.tolist()) == ([[10.0]], [[13.0]])


def test_bits_count_the_minimum_as_a_number() -> None:
    # 8 x 64 codes of 4 bits are 64 words; 8 x 2 scales and as many minima of 16 bits.
    assert packed_bits((8, 64), Grid.with_real_minimum(4), Tile(1, 32), torch.float16) == 64 * 32 + 2 * 16 * 16


def test_no_weight_is_further_than_half_a_step_from_its_code() -> None:
    weight = 3 + torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    q = made(weight, Grid.with_real_minimum(4), Tile(1, 32))
    apart = (q.dequantize() - weight).abs().view(16, 2, 32).amax(-1)
    assert bool((apart <= q.scale / 2 + 1e-5).all())
    integer = made(weight, Grid.integers(4), Tile(1, 32))
    assert float((q.dequantize() - weight).norm()) < 0.8 * float((integer.dequantize() - weight).norm())


def test_training_sees_what_is_stored() -> None:
    weight = 3 + torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    grid, tile = Grid.with_real_minimum(3), Tile(1, 32)
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    seen = fake_quantize(weight, low, high, grid, tile, torch.float32)
    assert torch.allclose(seen, made(weight, grid, tile).dequantize(), atol=1e-6)


@pytest.mark.parametrize(
    "method", ["rtn", "easyquant", "gptq", "lwc", "lwc+gptq", "awq", "smoothquant+lwc", "adadim", "lsq", "pact"]
)
def test_every_method(method: str, tiny: Checkpoints, text: Path, tmp_path: Path) -> None:
    learns = method not in ("rtn", "easyquant")
    recipe = Recipe(
        str(tiny()), "W4A16g32real", method, samples=4, seqlen=32, calibration=str(text) if learns else None
    )
    assert bitwright.quantize(recipe, tmp_path / "out").format == "bitwright"
    found = bitwright.verify(tmp_path / "out", tiny())
    assert found.passed, [check for check in found.checks if not check.passed]
    assert found.kl_divergence is not None and found.kl_divergence < 0.4


def test_it_loses_less_than_an_integer_zero_point(tiny: Checkpoints, tmp_path: Path) -> None:
    errors = {}
    for scheme in ("W3A16g32real", "W3A16g32"):
        bitwright.quantize(Recipe(str(tiny()), scheme, "rtn"), tmp_path / scheme)
        errors[scheme] = bitwright.verify(tmp_path / scheme, tiny(), logits=False).mean_error or 0.0
    assert 0 < errors["W3A16g32real"] < errors["W3A16g32"]


def test_gguf_holds_it_exactly_and_gptq_does_not(tiny: Checkpoints, tmp_path: Path) -> None:
    bitwright.quantize(Recipe(str(tiny(dtype="float16", eos_token_id=0)), "W4A16g32real", "rtn"), tmp_path / "out")
    exported = bitwright.export(tmp_path / "out", tmp_path / "m.gguf", format="gguf")
    assert exported.exact == exported.linears == 14
    assert bitwright.verify(tmp_path / "m.gguf", tmp_path / "out").passed
    with pytest.raises(RecipeError, match="cannot be held exactly in this format"):
        bitwright.export(tmp_path / "out", tmp_path / "gptq", format="gptq")
    for format in ("gptq", "awq", "compressed-tensors", "mlc"):
        with pytest.raises(bitwright.UserError, match=format):
            bitwright.quantize(Recipe(str(tiny()), "W4A16g32real", "rtn", format), tmp_path / "no")
    direct = bitwright.quantize(
        Recipe(str(tiny(dtype="float16", eos_token_id=0)), "W4A16g32real", "rtn", "gguf"), tmp_path / "d.gguf"
    )
    assert direct.format == "gguf"
    assert Grid.with_real_minimum(4).zero is Zero.REAL


@pytest.mark.parametrize("bits", [5, 6, 7, 8])
def test_gguf_has_no_place_for_it_above_four_bits(bits: int) -> None:
    """Q8_0 has a step and no minimum: a real one is no zero point that could be taken off the codes."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)) * 0.1
    q = made(weight, Grid.with_real_minimum(bits), Tile(1, 32))
    assert not gguf.FORMAT.holds(q.grid, q.tile, False)
    with pytest.raises(RecipeError, match=f"a {bits}-bit weight with a real-valued zero .* cannot be held exactly"):
        held("x", q, Kind.Q8_0, lossy=False)
    again = held("x", q, Kind.Q8_0, lossy=True).difference
    assert not again.codes and 0 < again.error < 1e-3


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_preset_of_mlc_takes_its_codes(bits: int) -> None:
    for preset in presets.PRESETS:
        weight = torch.randn(8, 4 * preset.group, generator=torch.Generator().manual_seed(2)) * 0.1
        q = made(weight, Grid.with_real_minimum(bits), Tile(1, preset.group))
        assert not preset.holds(q.grid, q.tile) and presets.placed(q, preset) is None
        few = replace(q, codes=q.codes.clamp(max=1))  # which would fit as they are
        assert presets.placed(few, preset) is None


def test_one_such_linear_among_others_is_told_and_not_misread(tiny: Checkpoints, tmp_path: Path) -> None:
    model = str(tiny(dtype="float16", eos_token_id=0))
    for scheme, own, format in (("W4A16g32sym", "W3A16g32real", "mlc"), ("W4A16g32", "W5A16g32real", "gguf")):
        recipe = Recipe(model, scheme, "rtn", "bitwright", scheme_for={"*.q_proj": own})
        bitwright.quantize(recipe, tmp_path / format)
        with pytest.raises(RecipeError, match=r"q_proj.* cannot be held exactly"):
            bitwright.export(tmp_path / format, tmp_path / f"out.{format}", format=format)
        exported = bitwright.export(tmp_path / format, tmp_path / f"out.{format}", format=format, lossy=True)
        assert exported.codes_kept == 12 and exported.largest_error < 0.05
        assert bitwright.verify(tmp_path / f"out.{format}", tmp_path / format).passed


@pytest.mark.parametrize("format", [gptq, awq, compressed_tensors])
def test_formats_with_integer_zero_points_refuse_its_tensors(format: ModuleType) -> None:
    q = made(torch.randn(32, 64, generator=torch.Generator().manual_seed(3)), Grid.with_real_minimum(4), Tile(1, 32))
    assert not format.holds(q.grid, q.tile, False)
    with pytest.raises(RecipeError):
        format.encode("x", q)


def test_read_back_codes_without_a_minimum_are_not_those_of_one() -> None:
    q = made(torch.randn(4, 64, generator=torch.Generator().manual_seed(4)), Grid.with_real_minimum(4), Tile(1, 32))
    stored = Levels(q.codes.to(torch.int8), q.scale.half(), None, 32)
    assert unlike(replace(q, scale=q.scale.half().float()), slice(None), stored) == "minima"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", [Grid.with_real_minimum(4), Grid.integers(4), Grid.integers(4, symmetric=True)])
def test_the_span_of_stored_numbers_gives_them_back(grid: Grid, dtype: torch.dtype) -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    scale, zero = affine(low, high, grid, dtype)
    again, zero_again = affine(*span(scale, zero, grid), grid, dtype)
    assert torch.equal(again, scale)
    if zero is not None and zero_again is not None:
        assert torch.equal(zero_again, zero)
