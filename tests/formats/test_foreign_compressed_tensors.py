"""compressed-tensors folders that others wrote: tensors as the library's own compressors make them, read by us."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file
from torch import Tensor

from bitwright.core.errors import CheckpointError
from bitwright.core.grid import Grid
from bitwright.core.packing import unpack_apart
from bitwright.core.quantized import Described
from bitwright.formats import QuantizedFolder
from bitwright.formats.compressed_tensors import FORMAT

assert FORMAT.reader is not None
READER = FORMAT.reader
OUT, IN = 24, 64
STRATEGIES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "tensor": ({}, (1,)),
    "channel": ({}, (OUT, 1)),
    "group": ({"group_size": 16}, (OUT, 4)),
    "block": ({"block_structure": [8, 16]}, (3, 4)),
}


def weights(bits: int = 4, symmetric: bool = True, strategy: str = "group", **also: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "group_size": 16, **also}


def config(layout: str = "pack-quantized", **changes: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights(), "input_activations": None}}
    said = {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups, "ignore": ["lm_head"]}
    return said | {"quantization_status": "compressed"} | changes


def compressed(layout: str, bits: int, symmetric: bool, strategy: str) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a linear x, and the weight that the library itself makes of them."""
    options, shape = STRATEGIES[strategy]
    how = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy=strategy, **options)
    scheme = QuantizationScheme(targets=["Linear"], weights=how)
    drawn = torch.Generator().manual_seed(bits)
    half = 2 ** (bits - 1)
    state: dict[str, Any] = {
        "weight": torch.randn(OUT, IN, generator=drawn),
        "weight_scale": torch.rand(shape, generator=drawn) / half + 0.01,
        "weight_zero_point": torch.randint(-half, half, shape, generator=drawn).to(torch.int8) * (not symmetric),
    }
    kind = BaseCompressor.get_value_from_registry(layout)
    made = kind.compress(state, scheme)
    return {f"x.{leaf}": tensor for leaf, tensor in made.items()}, kind.decompress(made, scheme)["weight"]


@pytest.mark.parametrize("layout", ["pack-quantized", "int-quantized", "naive-quantized"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_library_makes_the_same_weights(layout: str, strategy: str, symmetric: bool, bits: int) -> None:
    if layout == "pack-quantized" and strategy == "block":
        pytest.skip("the library packs no blocks")
    tensors, want = compressed(layout, bits, symmetric, strategy)
    q = READER.read(tensors, "x", Described(Grid.integers(bits, symmetric)))
    assert torch.equal(q.dequantize(), want)
    assert (q.grid, q.zero is None) == (Grid.integers(bits, symmetric), symmetric)
    assert q.codes.min() >= q.grid.qmin and q.codes.max() <= q.grid.qmax and want.unique().numel() > bits
    assert {name.removeprefix("x.") for name in tensors} <= {*FORMAT.leaves}
    assert READER.shape(lambda leaf: _there(tensors, leaf).shape, lambda leaf: _there(tensors, leaf), q.grid) == (
        OUT,
        IN,
    )


def saved(tensors: dict[str, Tensor], folder: Path, layout: str, said: dict[str, Any]) -> QuantizedFolder:
    """A folder with this linear alone."""
    folder.mkdir()
    groups = {"group_0": {"targets": ["Linear"], "weights": said, "input_activations": None}}
    described = config(layout, config_groups=groups)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": described}))
    save_file(tensors, folder / "model.safetensors")
    return QuantizedFolder.open(folder)


@pytest.mark.parametrize("layout", ["pack-quantized", "int-quantized", "naive-quantized"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_headers_pass_wherever_tensors_do(layout: str, strategy: str, symmetric: bool, tmp_path: Path) -> None:
    if layout == "pack-quantized" and strategy == "block":
        pytest.skip("the library packs no blocks")
    said = weights(3, symmetric, strategy, **STRATEGIES[strategy][0])
    made, _ = compressed(layout, 3, symmetric, strategy)
    more: dict[str, dict[str, Tensor]] = {
        "as they are": {},
        "no order": {"x.weight_g_idx": torch.full((IN,), -1, dtype=torch.int32)},
        "zeros one to a byte": {"x.weight_zero_point": torch.zeros(STRATEGIES[strategy][1], dtype=torch.int8)},
    }
    for n, tensors in enumerate(more.values()):
        model = saved(made | tensors, tmp_path / str(n), layout, said)
        model.outline("x")
        assert model.read("x").shape == (OUT, IN)
    model = saved(made | {"x.weight_scale": torch.ones(5, 3)}, tmp_path / "damaged", layout, said)
    for refuses in (model.outline, model.read):
        with pytest.raises(CheckpointError, match="x do not fit together"):
            refuses("x")


def test_headers_pass_where_no_code_is_cut(tmp_path: Path) -> None:
    tensors = {"x.weight_scale": torch.ones(1, 1), "x.weight_shape": torch.tensor([1, 64])}
    tensors["x.weight_packed"] = torch.zeros(1, 7, dtype=torch.int32)
    saved(tensors, tmp_path / "folder", "pack-quantized", weights(3, True, "channel")).outline("x")


def _there(tensors: dict[str, Tensor], leaf: str) -> Any:
    if f"x.{leaf}" not in tensors:
        raise CheckpointError(leaf)
    return tensors[f"x.{leaf}"]


def test_zero_points_one_to_a_byte_beside_packed_codes() -> None:
    """As releases before 0.10 wrote them."""
    tensors, want = compressed("pack-quantized", 4, False, "group")
    plain, _ = compressed("int-quantized", 4, False, "group")
    tensors["x.weight_zero_point"] = plain["x.weight_zero_point"]
    assert torch.equal(READER.read(tensors, "x", Described(Grid.integers(4))).dequantize(), want)


def test_zero_points_that_are_0_on_a_symmetric_grid_and_that_are_not() -> None:
    tensors, want = compressed("pack-quantized", 4, True, "group")
    tensors["x.weight_zero_point"] = torch.zeros(OUT, 4, dtype=torch.int8)
    q = READER.read(tensors, "x", Described(Grid.integers(4, True)))
    assert q.zero is None and torch.equal(q.dequantize(), want)
    tensors["x.weight_zero_point"] += 1
    q = READER.read(tensors, "x", Described(Grid.integers(4, True)))
    assert q.grid == Grid.integers(4)
    torch.testing.assert_close(q.dequantize(), want - q.scale.repeat_interleave(16, 1))


def test_words_in_which_no_code_is_cut() -> None:
    """3 bits, ten to a word, by hand: codes 0 to 7, 0, 1 and then 2, 3."""
    first = sum(code << (3 * n) for n, code in enumerate([0, 1, 2, 3, 4, 5, 6, 7, 0, 1]))
    words = torch.tensor([[first, 2 + 3 * 8]], dtype=torch.int32)
    assert unpack_apart(words, 3, 12).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]]
    wide = torch.zeros(1, 7, dtype=torch.int32)
    wide[0, 0] = first
    tensors = {"x.weight_packed": wide, "x.weight_scale": torch.ones(1, 1), "x.weight_shape": torch.tensor([1, 64])}
    q = READER.read(tensors, "x", Described(Grid.integers(3, True)))
    assert q.codes[0, :11].tolist() == [-4, -3, -2, -1, 0, 1, 2, 3, -4, -3, -4], "64 codes: 7 words so, 6 densely"


def test_channels_out_of_order_are_refused_and_an_order_that_is_none_is_not() -> None:
    tensors, want = compressed("pack-quantized", 4, True, "group")
    for order in (torch.full((IN,), -1), torch.arange(IN) // 16):
        tensors["x.weight_g_idx"] = order.to(torch.int32)
        assert torch.equal(READER.read(tensors, "x", Described(Grid.integers(4, True))).dequantize(), want)
    tensors["x.weight_g_idx"] = tensors["x.weight_g_idx"].flip(0)
    with pytest.raises(CheckpointError, match="x: its input channels are sorted into groups out of order"):
        READER.read(tensors, "x", Described(Grid.integers(4, True)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x.weight_packed": torch.zeros(OUT, 9, dtype=torch.int32)}, "9 words for 64 codes"),
        ({"x.weight_packed": None, "x.weight": torch.zeros(OUT, IN)}, "not int8"),
        ({"x.weight_packed": None, "x.weight": torch.full((OUT, IN), 9, dtype=torch.int8)}, "more than 4 bits"),
        ({"x.weight_zero_point": torch.zeros(OUT, 3, dtype=torch.int8)}, "zero points of"),
    ],
)
def test_tensors_that_do_not_fit(change: dict[str, Tensor | None], says: str) -> None:
    tensors, _ = compressed("pack-quantized", 4, True, "group")
    changed = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
    with pytest.raises(ValueError, match=says):
        READER.read(changed, "x", Described(Grid.integers(4, True)))
    with pytest.raises(ValueError, match="no weight_zero_point"):
        READER.read(tensors, "x", Described(Grid.integers(4)))


def test_groups_of_linears_with_bits_of_their_own() -> None:
    """A name before a pattern, a pattern before a class, in whatever order they stand."""
    groups = {
        "all": {"targets": ["Linear"], "weights": weights(4), "format": "pack-quantized"},
        "down": {"targets": ["re:.*down_proj$"], "weights": weights(8, False), "format": "int-quantized"},
        "one": {"targets": ["model.layers.0.mlp.down_proj"], "weights": weights(3), "format": "pack-quantized"},
    }
    said = READER.described(config("mixed-precision", config_groups=groups))
    names = ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj")
    assert [said.grid_of(name) for name in names] == [Grid.integers(3, True), Grid.integers(8), Grid.integers(4, True)]
    assert said.kept == ("lm_head",)


def test_activations_are_read_where_they_are_quantized_as_the_model_runs() -> None:
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    groups = {"g": {"targets": ["Linear"], "weights": weights(8), "input_activations": inputs}}
    said = READER.described(config("int-quantized", config_groups=groups, kv_cache_scheme=inputs | {"num_bits": 4}))
    assert (said.grid, said.activations, said.kv) == (
        Grid.integers(8, True),
        Grid.integers(8, True),
        Grid.integers(4, True),
    )
    for change in ({"dynamic": False}, {"type": "float"}, {"dynamic": "local"}):
        groups["g"]["input_activations"] = inputs | change
        with pytest.raises(CheckpointError, match=r"activations of 8 bits.* Bitwright reads integer weights"):
            READER.described(config("int-quantized", config_groups=groups))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": "float-quantized"}, "stored as float-quantized"),
        ({"format": "nvfp4-pack-quantized"}, "stored as nvfp4-pack-quantized"),
        ({"format": "marlin-24"}, "stored as marlin-24"),
        ({"format": "dense"}, "stored as dense"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, r"sparse \(sparse-24-bitmask\)"),
        ({"transform_config": {"config_groups": {"R3": {}}}}, "transformed as it runs"),
        ({"quantization_status": "frozen"}, "not packed yet"),
        ({"config_groups": {}}, "name no weights"),
        ({"config_groups": None}, "name no weights"),
        ({"config_groups": [1]}, "cannot be read"),
        ({"config_groups": {"g": {"targets": ["Linear"], "weights": "W4A16"}}}, "cannot be read"),
        ({"config_groups": {"g": {"targets": ["Linear"], "weights": weights(type="float")}}}, "type float"),
        ({"config_groups": {"g": {"targets": ["Linear"], "weights": weights(1)}}}, "of 1 bits"),
        (
            {"config_groups": {"g": {"targets": ["Linear"], "weights": weights(strategy="tensor_group")}}},
            "tensor_group",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_with_what_can(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match="Bitwright reads integer weights of 2 to 8 bits") as error:
        READER.described(config() | changes)
    assert re.search(says, str(error.value))
