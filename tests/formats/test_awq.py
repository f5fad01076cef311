"""The awq format: written, read back, and read by a decoder that knows docs/formats/awq.md alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.formats.test_gptq import plain, same, some
from tests.golden import gptq_page

from bitwright.core.errors import CheckpointError, RecipeError
from bitwright.core.grid import FULL, Grid, Tile
from bitwright.core.qtensor import QTensor
from bitwright.core.quantized import Described, WrittenModel
from bitwright.core.scheme import Scheme
from bitwright.formats import awq as format


def written(scheme: str, kept: tuple[str, ...] = ("lm_head",)) -> dict[str, Any]:
    config = format.quantization_config(WrittenModel(Scheme.parse(scheme), None, torch.float16, kept))
    found: dict[str, Any] = json.loads(json.dumps(config))
    return found


@settings(max_examples=60)
@given(st.integers(1, 9), st.sampled_from([(1, 30), (2, 16), (4, 16), (3, 128)]), st.integers(0, 99))
def test_what_is_written_reads_back_bit_for_bit(rows: int, groups: tuple[int, int], seed: int) -> None:
    shape, tile = (rows * 8, groups[0] * groups[1]), Tile(1, groups[1])
    q = some(shape, Grid.integers(4), tile, seed)
    tensors = format.encode("a.b", q)
    back = format.read(tensors, "a.b", format.described(written(f"W4A16g{groups[1]}")))
    assert same(back, q) and back.tile == tile
    assert torch.equal(format.decode(tensors, "a.b", Grid.integers(4)), q.dequantize())
    assert (
        format.shape(lambda leaf: tuple(tensors[f"a.b.{leaf}"].shape), lambda leaf: tensors[leaf], Grid.integers(4))
        == shape
    )
    counted = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert format.stored_bytes(shape, Scheme(Grid.integers(4), tile), torch.bfloat16) == counted


@pytest.mark.parametrize("group", [FULL, 32], ids=["channel", "group"])
def test_the_page_says_enough_to_read_it(group: int, tmp_path: Path) -> None:
    q = some((72, 96), Grid.integers(4), Tile(1, group), 5)
    save_file(format.encode("x.y", q), tmp_path / "x.safetensors")
    tensors = plain(load_file(tmp_path / "x.safetensors"))
    config = written(str(Scheme(Grid.integers(4), Tile(1, group))))
    codes, zeros, scales = gptq_page.awq_parts(tensors, "x.y")
    assert q.zero is not None
    np.testing.assert_array_equal(codes.T, q.codes.numpy())
    np.testing.assert_array_equal(zeros.T, q.zero.numpy())
    np.testing.assert_array_equal(scales.T, q.scale.double().numpy())
    want = q.dequantize(torch.float64).numpy()
    np.testing.assert_array_equal(gptq_page.awq_weight(tensors, "x.y", config["group_size"]), want)


def test_a_word_by_hand() -> None:
    """Outputs 0 to 7 with the codes 0 to 7: from the lowest four bits on 0, 2, 4, 6, 1, 3, 5, 7."""
    codes = torch.arange(8, dtype=torch.uint8)[:, None]
    q = QTensor(codes, torch.ones(8, 1).half(), codes.flip(0), Grid.integers(4), Tile(1, FULL))
    tensors = format.encode("x", q)
    assert tensors["x.qweight"].tolist() == [[0x75316420]]
    assert tensors["x.qzeros"].tolist() == [[0x02461357]]


def test_symmetric_codes_get_the_zero_point_8() -> None:
    q = some((8, 32), Grid.integers(4, True), Tile(1, 16))
    tensors = format.encode("x", q)
    assert {word & 0xFFFFFFFF for word in tensors["x.qzeros"].flatten().tolist()} == {0x88888888}
    back = format.read(tensors, "x", Described(Grid.integers(4)))
    assert back.zero is not None and torch.equal(back.dequantize(), q.dequantize())


def test_config_says_the_scheme_and_what_is_left_alone() -> None:
    config = written("W4A16g64", ("lm_head", "model.layers.0.mlp.up_proj"))
    assert (config["bits"], config["group_size"], config["zero_point"], config["version"]) == (4, 64, True, "gemm")
    assert config["modules_to_not_convert"] == ["lm_head", "model.layers.0.mlp.up_proj"]
    assert config["dynamic"] == {r"-:^model\.layers\.0\.mlp\.up_proj$": {}} and config["lm_head"] is False
    assert written("W4A16")["group_size"] == -1 and written("W4A16", ())["lm_head"] is True
    assert format.described(config).kept == ("lm_head", "model.layers.0.mlp.up_proj")
    assert format.described(
        {"w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"}
    ).grid == Grid.integers(4)


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"version": "gemv"}, "version gemv"), ({"bits": 8}, "8 bits"), ({"zero_point": False}, "zero_point False")],
)
def test_other_layouts_are_refused_with_what_can_be_read(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match="Bitwright reads version gemm with 4 bits and zero points") as error:
        format.described(written("W4A16g128") | changes)
    assert says in str(error.value)


def test_what_it_cannot_hold_is_refused() -> None:
    assert not format.holds(Grid.integers(3), Tile(1, 32), False) and not format.holds(
        Grid.integers(4), Tile(32, 1), False
    )
    assert not format.holds(Grid.integers(4), Tile(1, 32), True)
    with pytest.raises(RecipeError, match="awq holds 4 bits"):
        format.encode("a", some((32, 32), Grid.integers(3), Tile(1, 32)))
    with pytest.raises(RecipeError, match=r"a\.b .*: 12 output features are no multiple of 8"):
        format.encode("a.b", some((12, 32), Grid.integers(4), Tile(1, 32)))
    for scheme, says in (
        ("W3A16g128", "awq holds 4 bits, scheme W3A16g128 asks for 3"),
        ("W4A16g128ic", "awq holds neither groups along the output"),
    ):
        with pytest.raises(RecipeError, match=says):
            written(scheme)
    with pytest.raises(RecipeError, match="fused over 2 experts"):
        format.FORMAT.encode_stacked("a", [some((32, 32), Grid.integers(4), Tile(1, 32))] * 2)
