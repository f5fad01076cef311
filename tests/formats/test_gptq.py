"""The gptq format: written, read back, and read by a decoder that knows docs/formats/gptq.md alone."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.golden import gptq_page
from torch import Tensor
from transformers import LlamaConfig

from bitwright.core.decisions import LinearDecision
from bitwright.core.errors import CheckpointError, RecipeError
from bitwright.core.grid import FULL, Grid, Tile
from bitwright.core.qtensor import QTensor
from bitwright.core.quantized import Departure, Described, WrittenModel
from bitwright.core.scheme import Scheme
from bitwright.families import llama
from bitwright.formats import gptq as format
from bitwright.steps.apply import quantize_linear

GRIDS = [Grid.integers(bits, symmetric) for bits in format.BITS for symmetric in (False, True)]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "formats" / "gptq.md"


def some(shape: tuple[int, int], grid: Grid, tile: Tile, seed: int = 0) -> QTensor:
    """A weight of random codes and zero points, 0 and the largest among them."""
    drawn = torch.Generator().manual_seed(seed)
    counts = tile.counts(shape)
    codes = torch.randint(grid.qmin, grid.qmax + 1, shape, generator=drawn)
    zero = None if grid.symmetric else torch.randint(0, grid.qmax + 1, counts, generator=drawn).to(torch.uint8)
    if zero is not None:
        zero[0, 0], zero[-1, -1] = 0, grid.qmax
    scale = (torch.rand(counts, generator=drawn) + 0.01).half()
    return QTensor(codes.to(torch.int8 if grid.symmetric else torch.uint8), scale, zero, grid, tile)


def written(scheme: str, **also: Any) -> dict[str, Any]:
    config = format.quantization_config(
        WrittenModel(
            Scheme.parse(scheme),
            llama.family(LlamaConfig().to_dict()),
            torch.float16,
            **({"kept": ("lm_head",)} | also),
        )
    )
    assert config is not None
    found: dict[str, Any] = json.loads(json.dumps(config))
    return found


def plain(tensors: dict[str, Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    return {n: (t.double() if t.is_floating_point() else t).numpy() for n, t in tensors.items()}


def same(one: QTensor, other: QTensor) -> bool:
    zeros = (one.zero is None and other.zero is None) or (
        one.zero is not None and other.zero is not None and torch.equal(one.zero, other.zero)
    )
    codes = one.codes.dtype == other.codes.dtype and torch.equal(one.codes, other.codes)
    return zeros and codes and torch.equal(one.scale, other.scale) and one.grid == other.grid


@settings(max_examples=60)
@given(
    st.integers(1, 3), st.sampled_from([(1, 64), (2, 32), (4, 16), (3, 32), (1, 32)]), st.sampled_from(GRIDS),
    st.integers(0, 99),
)  # fmt: skip
def test_what_is_written_reads_back_bit_for_bit(rows: int, groups: tuple[int, int], grid: Grid, seed: int) -> None:
    shape, tile = (rows * 32, groups[0] * groups[1]), Tile(1, groups[1])
    q = some(shape, grid, tile, seed)
    tensors = format.encode("a.b", q)
    read = format.described(written(f"W{grid.bits}A16g{groups[1]}{'sym' if grid.symmetric else ''}"))
    back = format.read(tensors, "a.b", read)
    assert same(back, q) and back.tile == tile and back.shape == shape
    assert torch.equal(format.decode(tensors, "a.b", grid), q.dequantize())
    assert format.shape(lambda leaf: tuple(tensors[f"a.b.{leaf}"].shape), lambda leaf: tensors[leaf], grid) == shape
    counted = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert format.stored_bytes(shape, Scheme(grid, tile), torch.bfloat16) == counted


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("group", [FULL, 32], ids=["channel", "group"])
def test_the_page_says_enough_to_read_it(grid: Grid, group: int, tmp_path: Path) -> None:
    q = some((64, 96), grid, Tile(1, group), 5)
    save_file(format.encode("x.y", q), tmp_path / "x.safetensors")
    tensors = plain(load_file(tmp_path / "x.safetensors"))
    config = written(str(Scheme(grid, Tile(1, group))))
    assert config["group_size"] == (-1 if group == FULL else group)
    codes, zeros, scales = gptq_page.gptq_parts(tensors, "x.y", config)
    middle = 2 ** (grid.bits - 1)
    np.testing.assert_array_equal(codes.T, q.codes.int().numpy() + (middle if grid.symmetric else 0))
    np.testing.assert_array_equal(zeros.T, np.full(q.scale.shape, middle) if q.zero is None else q.zero.numpy())
    np.testing.assert_array_equal(scales.T, q.scale.double().numpy())
    want = q.dequantize(torch.float64).numpy()
    np.testing.assert_array_equal(gptq_page.gptq_weight(tensors, "x.y", config), want)


def test_the_example_of_the_page() -> None:
    """3 bits: the words of 32 inputs by hand, codes 0 to 7 again and again; a zero point 0 in both versions."""
    codes = torch.arange(32, dtype=torch.uint8).remainder(8).repeat(32, 1)
    zero = torch.zeros(32, 1, dtype=torch.uint8)
    tensors = format.encode("x", QTensor(codes, torch.full((32, 1), 0.5).half(), zero, Grid.integers(3), Tile(1, FULL)))
    words = [0xFAC688 | 0x88 << 24, 0xC688FAC6, 0xFAC688FA]
    assert [int(word) & 0xFFFFFFFF for word in tensors["x.qweight"][:, 0]] == words
    assert tensors["x.qzeros"].tolist() == [[0, 0, 0]]
    one = {**tensors, "x.qzeros": torch.full((1, 3), -1, dtype=torch.int32)}
    back = format.read(one, "x", Described(Grid.integers(3), variant="gptq"))
    assert back.zero is not None and not back.zero.any(), "stored 7 is 0 in version 1"
    assert all(f"{word:08X}" in PAGE.read_text() for word in words)


def test_symmetric_is_version_1_and_asymmetric_version_2() -> None:
    assert [written(s)["checkpoint_format"] for s in ("W4A16g128sym", "W4A16g128")] == ["gptq", "gptq_v2"]
    q = some((32, 32), Grid.integers(4, True), Tile(1, 32))
    assert set(format.encode("x", q)["x.qzeros"].flatten().tolist()) == {0x77777777}


def test_config_says_the_scheme_and_what_is_left_alone() -> None:
    config = written("W8A16sym", kept=("lm_head", "model.layers.0.mlp.up_proj"))
    assert (config["bits"], config["sym"], config["group_size"], config["desc_act"]) == (8, True, -1, False)
    assert config["dynamic"] == {r"-:^model\.layers\.0\.mlp\.up_proj$": {}} and config["lm_head"] is False
    assert written("W8A16sym", kept=())["lm_head"] is True
    read = format.described(config)
    assert (read.grid, read.variant) == (Grid.integers(8, True), "gptq")


def test_rules_of_others_give_linears_grids_of_their_own() -> None:
    said = written("W4A16g32") | {"dynamic": {r"+:.*\.(?:1[0-5])\..*": {"bits": 8, "sym": True}, r"-:.*moe.*": {}}}
    read = format.described(said)
    assert read.grid_of("model.layers.12.mlp.up_proj") == Grid.integers(8, True)
    assert read.grid_of("model.layers.2.mlp.up_proj") == Grid.integers(4)


def test_without_g_idx_and_with_one_that_sorts_nothing() -> None:
    q = some((32, 64), Grid.integers(4), Tile(1, 16))
    tensors = format.encode("x", q)
    tensors.pop("x.g_idx")
    assert same(format.read(tensors, "x", Described(Grid.integers(4), variant="gptq_v2")), q)
    tensors["x.g_idx"] = torch.arange(64).flip(0).to(torch.int32) // 16
    with pytest.raises(CheckpointError, match="x: its input channels are sorted into groups out of order"):
        format.read(tensors, "x", Described(Grid.integers(4), variant="gptq_v2"))


def test_called_symmetric_with_zero_points_that_are_not() -> None:
    q = some((32, 64), Grid.integers(4), Tile(1, 16))
    back = format.read(format.encode("x", q), "x", Described(Grid.integers(4, True), variant="gptq_v2"))
    assert same(back, q)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"checkpoint_format": "marlin"}, "checkpoint_format marlin"),
        ({"is_marlin_format": True}, "checkpoint_format marlin"),
        ({"bits": 5}, "codes of 5 bits"),
        ({"bits": None}, "codes of None bits"),
        ({"pack_dtype": "int16"}, "in int16 words"),
        ({"dynamic": [1]}, "not a table"),
    ],
)
def test_other_layouts_are_refused_with_what_can_be_read(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match="Bitwright reads versions gptq and gptq_v2") as error:
        format.described(written("W4A16g128") | changes)
    assert says in str(error.value)


@pytest.mark.parametrize(("shape", "says"), [((48, 64), "48 output"), ((32, 72), "72 input")])
def test_sizes_that_do_not_fill_words_are_refused(shape: tuple[int, int], says: str) -> None:
    q = some(shape, Grid.integers(4), Tile(1, FULL))
    with pytest.raises(RecipeError, match=rf"a\.b .*: {says} features are no multiple of 32.*Take --format"):
        format.encode("a.b", q)


def test_what_it_cannot_hold_is_refused() -> None:
    for grid, tile in ((Grid.integers(5), Tile(1, 32)), (Grid.integers(4), Tile(32, 1))):
        assert not format.holds(grid, tile, False)
        with pytest.raises(RecipeError, match="gptq holds 2, 3, 4, 8 bits and groups along the input"):
            format.encode("a", some((32, 32), grid, tile))
    assert not format.holds(Grid.integers(4), Tile(1, 32), True)
    for scheme, says in (
        ("W5A16", "gptq holds 2, 3, 4, 8 bits, scheme W5A16 asks for others"),
        ("W4A16g128ic", "gptq holds neither groups along the output"),
    ):
        with pytest.raises(RecipeError, match=says):
            written(scheme)
    with pytest.raises(RecipeError, match="x: gptq holds neither"):
        written("W4A16", departures={"x": Departure((1, 64), 3)})
    with pytest.raises(RecipeError, match="fused over 2 experts"):
        format.FORMAT.encode_stacked("a", [some((32, 32), Grid.integers(4), Tile(1, 32))] * 2)


def test_scales_past_float16_are_refused_and_never_become_0() -> None:
    q = replace(some((32, 32), Grid.integers(4), Tile(1, 32)), scale=torch.full((32, 1), 1e4, dtype=torch.bfloat16))
    with pytest.raises(RecipeError, match=r"a: a scale of .* is too large for float16"):
        format.encode("a", q)
    small = format.encode("a", replace(q, scale=torch.full((32, 1), 1e-12)))["a.scales"]
    assert bool((small == 2.0**-24).all())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_weights_near_the_end_of_float16_are_clamped_into_it(grid: Grid) -> None:
    """Codes are computed against float16 scales: a range past 65504 gets the largest scale that stays finite."""
    weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(1)) * 1e5
    q = quantize_linear(weight, LinearDecision(), Scheme(grid), torch.float16)
    back = format.decode(format.encode("a", q), "a", grid)
    assert back.isfinite().all() and torch.equal(back, q.dequantize())
