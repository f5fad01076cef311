"""The bitwright format: written, read back, and read by a decoder that knows docs/formats/bitwright.md alone."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.golden import bitwright_page
from torch import Tensor
from transformers import LlamaConfig

from bitwright.core.account import LinearReport
from bitwright.core.decisions import LinearDecision
from bitwright.core.errors import CheckpointError
from bitwright.core.grid import FULL, Grid, Tile
from bitwright.core.qtensor import QTensor
from bitwright.core.quantized import Departure, Described, WrittenModel, departures
from bitwright.core.scheme import Scheme
from bitwright.families import llama
from bitwright.formats import bitwright as format
from bitwright.formats.bitwright.config import Config, schema
from bitwright.steps.apply import quantize_linear

PAGE = Path(__file__).resolve().parents[2] / "docs" / "formats" / "bitwright.md"
GRIDS = [Grid.integers(bits, symmetric) for bits in range(2, 9) for symmetric in (False, True)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 36), st.integers(1, 5), st.integers(1, 36))


def some(shape: tuple[int, int], grid: Grid, tile: Tile, dtype: torch.dtype, outliers: int = 0) -> QTensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0] + outliers)).to(dtype)
    kept = torch.zeros(shape[0] * shape[1], dtype=torch.bool)
    kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(4))[:outliers]] = True
    decided = LinearDecision(outliers=kept.view(shape) if outliers else None)
    return quantize_linear(weight, decided, Scheme(grid, tile), dtype)


def written(scheme: str, dtype: torch.dtype = torch.bfloat16, **also: Any) -> dict[str, Any]:
    config = format.quantization_config(
        WrittenModel(
            Scheme.parse(scheme), llama.family(LlamaConfig().to_dict()), dtype, **({"kept": ("lm_head",)} | also)
        )
    )
    assert config is not None
    return config


def plain(tensors: dict[str, Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    return {n: (t.double() if t.is_floating_point() else t).numpy() for n, t in tensors.items()}


@settings(max_examples=150)
@given(SHAPES, st.sampled_from(GRIDS), st.sampled_from(DTYPES), st.integers(0, 9))
def test_what_is_written_reads_back_bit_for_bit(
    extents: tuple[int, int, int, int], grid: Grid, dtype: torch.dtype, outliers: int
) -> None:
    (p, rows, q, columns), tile = extents, Tile(extents[1], extents[3])
    shape = (p * rows, q * columns)
    weight = some(shape, grid, tile, dtype, min(outliers, shape[0] * shape[1]))
    tensors = format.encode("a.b", weight)
    back = format.read(tensors, "a.b", Described(grid))
    assert torch.equal(back.codes, weight.codes) and torch.equal(back.scale, weight.scale)
    assert (back.zero is None) == (weight.zero is None)
    assert back.zero is None or weight.zero is None or torch.equal(back.zero, weight.zero)
    assert (back.codes.dtype, back.tile, back.grid) == (weight.codes.dtype, tile, grid)
    assert torch.equal(format.decode(tensors, "a.b", grid), weight.dequantize())
    counted = sum(t.numel() * t.element_size() for n, t in tensors.items() if "outlier" not in n)
    assert format.stored_bytes(shape, Scheme(grid, tile), dtype) == counted
    stored = sum(t.numel() * t.element_size() for n, t in tensors.items() if not n.endswith("weight_shape"))
    assert weight.storage_bits == 8 * stored


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("tile", [Tile(1, FULL), Tile(1, 8), Tile(35, 1), Tile(FULL, FULL)], ids=str)
def test_the_page_says_enough_to_read_it(grid: Grid, tile: Tile, tmp_path: Path) -> None:
    for dtype, outliers in zip(DTYPES, (0, 1, 17), strict=True):
        q = some((70, 40), grid, tile, dtype, outliers)
        save_file(format.encode("x.y", q), tmp_path / "x.safetensors")
        departed = {"x.y": Departure(q.tile.size(q.shape), outliers)} if outliers else {}
        config = json.loads(json.dumps(written(str(Scheme(grid)), dtype, departures=departed)))
        if not outliers:
            config["weights"]["tile"] = [tile.out, tile.in_]
        found = bitwright_page.weight(plain(load_file(tmp_path / "x.safetensors")), "x.y", config)
        np.testing.assert_array_equal(found, q.dequantize().double().numpy())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("tile", [Tile(1, FULL), Tile(35, 1), Tile(2, 8)], ids=str)
def test_the_page_says_enough_to_read_slices(grid: Grid, tile: Tile, tmp_path: Path) -> None:
    """Some with outliers, some without; none at all; a name with and without ".weight"."""
    for name, kept in (("x.y", (0, 3, 0, 17)), ("x.y.weight", (0, 0, 0)), ("x.weight.y", (1, 0))):
        slices = [some((70, 40), grid, tile, torch.bfloat16, outliers) for outliers in kept]
        x = name.removesuffix(".weight")
        save_file(format.encode_stacked(name, slices), tmp_path / "x.safetensors")
        departed = {x: Departure(tile.size((70, 40)), sum(kept))}
        config = json.loads(json.dumps(written(str(Scheme(grid)), departures=departed)))
        tensors = load_file(tmp_path / "x.safetensors")
        assert all(n.startswith(f"{x}.") for n in tensors) and (f"{x}.outlier_count" in tensors) == any(kept)
        want = torch.stack([q.dequantize() for q in slices])
        np.testing.assert_array_equal(
            bitwright_page.stacked_weight(plain(tensors), name, config), want.double().numpy()
        )
        assert torch.equal(format.decode_stacked(tensors, name, grid), want)
        counted = sum(t.numel() * t.element_size() for n, t in tensors.items() if "outlier" not in n)
        assert format.stored_bytes((len(kept), 70, 40), Scheme(grid, tile), torch.bfloat16) == counted


def test_slices_read_back_as_they_were() -> None:
    slices = [some((8, 12), Grid.integers(3), Tile(4, 6), torch.float32, outliers) for outliers in (5, 0)]
    back = format.read_stacked(format.encode_stacked("a", slices), "a", Grid.integers(3))
    assert [q.outlier_index is None for q in back] == [False, True]
    for q, was in zip(back, slices, strict=True):
        assert q.zero is not None and was.zero is not None and torch.equal(q.zero, was.zero)
        assert torch.equal(q.codes, was.codes) and torch.equal(q.scale, was.scale) and q.tile == was.tile


def test_an_empty_list_of_outliers_is_none_at_all() -> None:
    q = some((8, 12), Grid.integers(3), Tile(4, 6), torch.float32, 1)
    empty = replace(q, outlier_index=torch.empty(0, dtype=torch.int32), outlier_value=torch.empty(0))
    assert not [n for n in {**format.encode("a", empty), **format.encode_stacked("a", [empty])} if "outlier" in n]
    assert torch.equal(
        format.decode_stacked(format.encode_stacked("a", [q, empty]), "a", Grid.integers(3))[0], q.dequantize()
    )


@pytest.mark.parametrize("other", [((8, 6), Grid.integers(3)), ((8, 12), Grid.integers(4)), None], ids=str)
def test_slices_that_differ_are_not_stacked(other: tuple[tuple[int, int], Grid] | None) -> None:
    one = some((8, 12), Grid.integers(3), Tile(4, 6), torch.float32)
    slices = [] if other is None else [one, some(*other, Tile(4, 6), torch.float32)]
    with pytest.raises(ValueError, match="slices; to be stacked they need one shape, grid, tile and dtype"):
        format.encode_stacked("x", slices)


def test_the_example_of_the_page() -> None:
    """The bytes that stand there, and the weight that they are said to be."""
    tensors = {
        "x.weight_packed": np.array([[0x02], [0x35], [0x38], [0x09]], np.int32),
        "x.weight_zero_point": np.array([[0x08, 0x04]], np.int32),
        "x.weight_scale": np.full((2, 2), 0.25),
        "x.weight_shape": np.array([4, 2]),
        "x.outlier_index": np.array([5], np.int32),
        "x.outlier_value": np.array([3.0]),
    }
    config = written("W3A16g2ic", torch.float32, departures={"x": Departure((2, 1), 1)})
    want = [[0.5, -1.0], [1.25, 0.5], [-0.25, 3.0], [0.0, 0.25]]
    assert bitwright_page.weight(tensors, "x", config).tolist() == want
    given = {
        n: torch.from_numpy(t) if t.dtype != np.float64 else torch.from_numpy(t).float() for n, t in tensors.items()
    }
    assert format.decode(given, "x", Grid.integers(3)).tolist() == want
    page = PAGE.read_text()
    assert all(f"0x{byte:02x}" in page for byte in (0x02, 0x35, 0x38, 0x09)) and "0x08 0x04" in page


def test_the_schema_beside_the_page_is_the_one_that_is_read() -> None:
    beside = json.loads(PAGE.with_suffix(".schema.json").read_text())
    assert beside == schema()
    jsonschema.Draft202012Validator.check_schema(beside)


@pytest.mark.parametrize("scheme", ["W2A16", "W3A16g128ic", "W8A8g64icsym", "W4A8KV4", "W4A4KV16", "W4A16KV2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_configs_keep_to_the_schema_and_say_the_scheme(scheme: str, dtype: torch.dtype) -> None:
    departed = {"model.layers.0.mlp.up_proj": Departure((64, 1), 3)}
    config = json.loads(json.dumps(written(scheme, dtype, departures=departed)))
    jsonschema.Draft202012Validator(schema()).validate(config)
    read, asked = Config.parse(config), Scheme.parse(scheme)
    assert (read.weights.grid, read.tile("model.layers.1.mlp.up_proj")) == (asked.weight, asked.tile)
    assert (read.tile("model.layers.0.mlp.up_proj"), read.outliers("model.layers.0.mlp.up_proj")) == (Tile(64, 1), 3)
    grids = [None if said is None else said.grid for said in (read.activations, read.queries, read.keys_values)]
    assert grids == [asked.activations, asked.activations, asked.kv]
    assert (read.dtype, read.modules_to_not_convert) == (dtype, ("lm_head",))
    assert format.FORMAT.queries_left_out(asked) is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"version": 2}, "version: Input should be 1, found 2"),
        ({"weights": {"bits": 9, "symmetric": False, "tile": [1, -1], "dtype": "bfloat16"}}, "weights.bits"),
        ({"weights": {"bits": True, "symmetric": False, "tile": [1, -1], "dtype": "bfloat16"}}, "weights.bits"),
        ({"weights": {"bits": 4, "symmetric": False, "tile": [0, -1], "dtype": "bfloat16"}}, "weights.tile"),
        ({"weights": {"bits": 4, "symmetric": False, "tile": [1], "dtype": "bfloat16"}}, "weights.tile"),
        ({"weights": {"bits": 4, "symmetric": False, "tile": [1, -1], "dtype": "int8"}}, "weights.dtype"),
        ({"exceptions": {"x": {"tile": [1, 1], "outliers": -1}}}, "exceptions.x.outliers"),
        ({"exceptions": []}, "exceptions"),
        ({"queries": 4}, "queries"),
        ({"tomorrow": 1}, "tomorrow"),
        ({"modules_to_not_convert": {1, 2}}, "not JSON serializable"),
    ],
)
def test_a_config_that_nobody_wrote_is_one_clear_error(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match="quantization_config of this bitwright folder cannot be read") as error:
        Config.parse(written("W4A16g64ic") | changes)
    assert says in str(error.value)


def test_departures_are_what_the_scheme_does_not_say() -> None:
    rows = [
        LinearReport("plain", (64, 128), (1, 128), 4.0, 0, 0.0, None),
        LinearReport("turned", (64, 128), (64, 1), 4.0, 0, 0.0, None),
        LinearReport("kept", (64, 256), (1, 256), 4.0, 0, 0.0, None, outliers=7),
        LinearReport("own", (64, 256), (1, 64), 4.0, 0, 0.0, None),
    ]
    want = {"turned": Departure((64, 1), 0), "kept": Departure((1, 256), 7)}
    assert departures(Scheme(Grid.integers(4)), {"own": Scheme.parse("W8A16g64")}, rows) == want
