"""Engines' own grids in the bitwright format: signed scales, and groups that the end of a row cuts short."""

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.formats.test_bitwright import plain, some, written
from tests.golden import bitwright_page

from bitwright.core.errors import CheckpointError, RecipeError
from bitwright.core.quantized import Described
from bitwright.core.scheme import NAMED, Scheme
from bitwright.formats import bitwright as format
from bitwright.formats import compressed_tensors
from bitwright.formats.bitwright.config import Config, schema
from bitwright.kernels.reference import PackedLinear

SHAPES = [(5, 120), (6, 130), (3, 24)]
"""Whole groups of 40, a last group of 10, and less than one group."""


@pytest.mark.parametrize("scheme", NAMED)
@pytest.mark.parametrize("shape", SHAPES)
def test_written_read_back_loaded_and_read_from_the_page(scheme: str, shape: tuple[int, int], tmp_path: Path) -> None:
    asked = Scheme.parse(scheme)
    q = some(shape, asked.weight, asked.tile, torch.float16)
    save_file(format.encode("x.y", q), tmp_path / "x.safetensors")
    tensors = load_file(tmp_path / "x.safetensors")
    back = format.read(tensors, "x.y", Described(asked.weight))
    assert torch.equal(back.codes, q.codes) and torch.equal(back.scale, q.scale)
    assert (back.scale < 0).any() and (back.scale > 0).any()
    assert torch.equal(back.dequantize(), q.dequantize())
    assert ("x.y.weight_tile" in tensors) == asked.tile.cut(shape) == (shape[1] % asked.tile.in_ != 0)
    found = bitwright_page.weight(plain(tensors), "x.y", json.loads(json.dumps(written(scheme, torch.float16))))
    np.testing.assert_array_equal(found, q.dequantize().double().numpy())
    counted = sum(t.numel() * t.element_size() for t in tensors.values())
    assert format.stored_bytes(shape, asked, torch.float16) == counted

    linear = PackedLinear(shape, asked.weight, asked.tile, torch.float16)
    linear.load_state_dict({name.removeprefix("x.y."): tensor for name, tensor in tensors.items()})
    assert torch.equal(linear.dequantize(), q.dequantize())
    assert torch.equal(linear.rows(1, 3), q.dequantize()[1:3])


def test_slices_of_experts() -> None:
    asked = Scheme.parse("mlc:q3f16_1")
    slices = [some((n + 4, 70), asked.weight, asked.tile, torch.float16) for n in (1, 1, 1)]
    tensors = format.encode_stacked("a.b", slices)
    back = format.read_stacked(tensors, "a.b", asked.weight)
    assert [q.tile for q in back] == [asked.tile] * 3
    config = written("mlc:q3f16_1", torch.float16)
    config["exceptions"] = {"a.b": {"tile": [1, 40], "outliers": 0}}
    found = bitwright_page.stacked_weight(plain(tensors), "a.b", config)
    np.testing.assert_array_equal(found, torch.stack([q.dequantize() for q in slices]).double().numpy())


@pytest.mark.parametrize("scheme", NAMED)
def test_the_config_says_it_and_others_stay_as_they_were(scheme: str) -> None:
    config = json.loads(json.dumps(written(scheme, torch.float16)))
    jsonschema.Draft202012Validator(schema()).validate(config)
    read, asked = Config.parse(config), Scheme.parse(scheme)
    assert (read.weights.grid, read.tile("x"), config["weights"]["signed_scale"]) == (asked.weight, asked.tile, True)
    assert format.described(config).grid == asked.weight
    assert set(written("W4A16g32sym")["weights"]) == {"bits", "symmetric", "tile", "dtype"}


@pytest.mark.parametrize("weights", [{"symmetric": False}, {"bits": 8}])
def test_a_config_of_no_grid_is_refused(weights: dict[str, object]) -> None:
    config = written("mlc:q4f16_1", torch.float16)
    config["weights"] |= weights
    with pytest.raises(CheckpointError, match="a signed scale goes with a symmetric grid of less than 8 bits"):
        Config.parse(config)


def test_compressed_tensors_has_no_place_for_them() -> None:
    asked = Scheme.parse("mlc:q4f16_1")
    assert not compressed_tensors.holds(asked.weight, asked.tile, False)
    with pytest.raises(RecipeError, match="no grid that is an engine's own"):
        compressed_tensors.encode("x", some((4, 64), asked.weight, asked.tile, torch.float16))
