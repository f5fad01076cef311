"""Encoding and decoding, held to the library's own functions and to bytes counted from what is encoded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from bitwright.core.decisions import LinearDecision
from bitwright.core.errors import RecipeError
from bitwright.core.grid import FULL, Grid, Tile
from bitwright.core.qtensor import QTensor
from bitwright.core.quantized import Described, WrittenModel
from bitwright.core.scheme import Scheme
from bitwright.families import llama
from bitwright.formats.compressed_tensors import FORMAT
from bitwright.steps.apply import quantize_linear

assert FORMAT.reader is not None
READER = FORMAT.reader
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EVERY_GRID = [Grid.integers(bits, symmetric) for bits in range(2, 9) for symmetric in (False, True)]


def some(shape: tuple[int, int], grid: Grid, tile: Tile, dtype: torch.dtype, seed: int = 0) -> QTensor:
    """A weight in which every code can occur, rows of one sign among them."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    weight[0] = weight[0].abs()
    return quantize_linear(weight.to(dtype), LinearDecision(), Scheme(grid, tile), dtype)


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("grid", EVERY_GRID, ids=str)
@pytest.mark.parametrize("tile", [Tile(1, FULL), Tile(1, 16)], ids=["channel", "group"])
def test_the_library_unpacks_the_codes(grid: Grid, tile: Tile) -> None:
    q = some((36, 48), grid, tile, torch.bfloat16)
    tensors = FORMAT.encode("x", q)
    shift = 0 if grid.symmetric else 2 ** (grid.bits - 1)
    unpacked = unpack_from_int32(tensors["x.weight_packed"], grid.bits, torch.Size(q.shape))
    assert torch.equal(unpacked.int() + shift, q.codes.int())
    assert tensors["x.weight_shape"].tolist() == [36, 48]
    assert same(tensors["x.weight_scale"], q.scale)
    if q.zero is None:
        assert set(tensors) == {"x.weight_packed", "x.weight_scale", "x.weight_shape"}
    else:
        packed = tensors["x.weight_zero_point"]
        assert packed.shape == (-(-36 * grid.bits // 32), q.zero.shape[1]), "packed along the output dimension"
        zeros = unpack_from_int32(packed, grid.bits, q.zero.shape, packed_dim=0)
        assert torch.equal(zeros.int() + shift, q.zero.int())


@pytest.mark.parametrize("grid", EVERY_GRID, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_written_reads_back_bit_for_bit(grid: Grid, dtype: torch.dtype, tmp_path: Path) -> None:
    for shape, tile in [
        ((8, 32), Tile(1, FULL)),
        ((33, 50), Tile(1, 10)),
        ((1, 3), Tile(1, FULL)),
        ((5, 7), Tile(1, 7)),
    ]:
        q = some(shape, grid, tile, dtype)
        save_file(FORMAT.encode("a.b", q), tmp_path / "x.safetensors")
        tensors = load_file(tmp_path / "x.safetensors")
        back = READER.read(tensors, "a.b", Described(grid))
        assert same(back.codes, q.codes) and same(back.scale, q.scale) and same(back.zero, q.zero)
        assert (back.grid, back.tile.size(shape), back.shape) == (grid, tile.size(shape), shape)
        assert same(FORMAT.decode(tensors, "a.b", grid), q.dequantize())


def test_extreme_codes_survive() -> None:
    """Every code and zero point of the grid, the smallest and the largest among them, at places all over the words."""
    for grid in EVERY_GRID:
        every = torch.arange(grid.qmin, grid.qmax + 1)
        codes = every.repeat(2 * 33)[: 33 * len(every)].view(33, -1).to(torch.int8 if grid.symmetric else torch.uint8)
        zero = None if grid.symmetric else every.repeat(33)[:33, None].to(torch.uint8)
        q = QTensor(codes, torch.ones(33, 1), zero, grid, Tile(1, FULL))
        back = READER.read(FORMAT.encode("x", q), "x", Described(grid))
        assert same(back.codes, codes) and same(back.zero, zero)


@settings(max_examples=60)
@given(
    st.integers(1, 70), st.integers(1, 20), st.integers(2, 10), st.booleans(), st.sampled_from(EVERY_GRID),
    st.sampled_from(DTYPES),
)  # fmt: skip
def test_stored_bytes_are_those_of_what_is_encoded(
    rows: int, groups: int, size: int, per_channel: bool, grid: Grid, dtype: torch.dtype
) -> None:
    shape, tile = (rows, groups * size), Tile(1, FULL if per_channel else size)
    tensors = FORMAT.encode("x", some(shape, grid, tile, dtype))
    counted = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert FORMAT.stored_bytes(shape, Scheme(grid, tile), dtype) == counted


@pytest.mark.parametrize("shape", [(128, 128), (4096, 11008), (1, 1), (31, 33)])
def test_stored_bytes_by_hand(shape: tuple[int, int]) -> None:
    # 4 bits per channel, bfloat16: rows of ceil(I/8) words of 4 bytes, O scales of 2, ceil(O/8) words of zeros, and the
    # shape as two int64.
    rows, columns = shape
    by_hand = rows * -(-columns // 8) * 4 + rows * 2 + -(-rows // 8) * 4 + 16
    assert FORMAT.stored_bytes(shape, Scheme(Grid.integers(4)), torch.bfloat16) == by_hand


@pytest.mark.parametrize("tile", [Tile(16, 1), Tile(FULL, FULL), Tile(2, FULL)], ids=str)
def test_groups_along_the_output_are_refused(tile: Tile) -> None:
    with pytest.raises(
        RecipeError, match=r"a\.b: compressed-tensors holds neither groups along the output nor outliers"
    ):
        FORMAT.encode("a.b", some((16, 32), Grid.integers(4), tile, torch.float32))


def test_weights_fused_over_experts_are_refused() -> None:
    q = quantize_linear(torch.randn(4, 8), LinearDecision(), Scheme(Grid.integers(4)), torch.float32)
    with pytest.raises(RecipeError, match=r"a\.b: compressed-tensors holds no weight that is fused over 3 experts"):
        FORMAT.encode_stacked("a.b", [q] * 3)


def test_outliers_are_refused() -> None:
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    kept = LinearDecision(outliers=weight > 1)
    q = quantize_linear(weight, kept, Scheme(Grid.integers(4)), torch.float32)
    with pytest.raises(RecipeError, match=r"nor outliers, .* Leave --format out, or take --format bitwright"):
        FORMAT.encode("a.b", q)


def config_of(text: str, tiny: Callable[..., Path], quantize_lm_head: bool = False) -> dict[str, Any] | None:
    family = llama.family(AutoConfig.from_pretrained(tiny()).to_dict())
    kept = () if quantize_lm_head else ("lm_head",)
    return FORMAT.config(WrittenModel(Scheme.parse(text), family, torch.bfloat16, kept))


@pytest.mark.parametrize("text", ["W2A16g32", "W3A16sym", "W4A16", "W8A8", "W4A4", "W4A4KV4g32", "W4A16KV4", "W6A6sym"])
def test_the_config_is_one_of_the_librarys(text: str, tiny: Callable[..., Path]) -> None:
    written = config_of(text, tiny)
    assert written is not None
    parsed = QuantizationConfig.model_validate(written)
    scheme = Scheme.parse(text)
    group = parsed.config_groups["group_0"]
    assert group.targets == ["Linear"]
    assert (group.weights.num_bits, group.weights.symmetric) == (scheme.weight.bits, scheme.weight.symmetric)
    assert group.weights.strategy == ("channel" if scheme.tile.in_ == FULL else "group")
    assert group.weights.group_size == (None if scheme.tile.in_ == FULL else scheme.tile.in_)
    assert (group.input_activations is None) == (scheme.activations is None)
    assert (parsed.ignore, parsed.format, parsed.quantization_status) == (["lm_head"], "pack-quantized", "compressed")
    assert written["quant_method"] == "compressed-tensors"
    written.pop("dequantize", None)
    assert json.dumps(written) == json.dumps(parsed.to_dict()), "as the library itself would write it"


def test_the_output_layer_is_left_alone_unless_it_is_asked_for(tiny: Callable[..., Path]) -> None:
    one, other = config_of("W4A16", tiny), config_of("W4A16", tiny, quantize_lm_head=True)
    assert one is not None and other is not None
    assert (one["ignore"], other["ignore"]) == (["lm_head"], [])


@pytest.mark.parametrize(("text", "cache"), [("W4A4KV16", None), ("W4A8KV4", 4), ("W8A8KV4g32", 4)])
def test_queries_that_differ_from_the_cache_are_left_out(
    text: str, cache: int | None, tiny: Callable[..., Path]
) -> None:
    written = config_of(text, tiny)
    assert written is not None and list(written["config_groups"]) == ["group_0"]
    assert (written["kv_cache_scheme"] or {}).get("num_bits") == cache
    assert FORMAT.queries_left_out(Scheme.parse(text)) == Scheme.parse(text).activations
    assert FORMAT.queries_left_out(Scheme.parse("W4A4")) is None
