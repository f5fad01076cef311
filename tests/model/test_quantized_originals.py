"""Originals that are quantized already: read as the dense folder that their weights stand for."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import Checkpoints
from torch import Tensor

import bitwright
from bitwright import Recipe
from bitwright.core.errors import CheckpointError
from bitwright.model.quantized_original import DequantizedCheckpoint
from bitwright.model.source import Source, open_original

WEIGHTS, CONFIG = "model.safetensors", "quantization_config"
UP, HEAD = "model.layers.1.mlp.up_proj.weight", "lm_head.weight"
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
WAYS: tuple[dict[str, Any], ...] = (
    {"method": "rtn"},
    {"method": "gptq", "calibration": "builtin", "samples": 4, "seqlen": 32},
)


def in_float8(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """The codes and scales of a weight, and the weight that they stand for, block by block."""
    rows, columns = weight.shape
    scales = torch.empty(ceil(rows / block[0]), ceil(columns / block[1]))
    codes, dense = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight, dtype=torch.bfloat16)
    for p in range(scales.shape[0]):
        for q in range(scales.shape[1]):
            here = (slice(p * block[0], (p + 1) * block[0]), slice(q * block[1], (q + 1) * block[1]))
            scales[p, q] = weight[here].float().abs().max() / 448
            codes[here] = (weight[here].float() / scales[p, q]).to(torch.float8_e4m3fn)
            dense[here] = codes[here].float() * scales[p, q]
    return codes, scales, dense


def written(folder: Path, original: Path, tensors: Mapping[str, Tensor], config: dict[str, Any] | None) -> Path:
    """A folder with other tensors and another quantization_config."""
    shutil.copytree(original, folder)
    save_file(dict(tensors), folder / WEIGHTS, metadata={"format": "pt"})
    described = json.loads((folder / "config.json").read_text())
    described |= {} if config is None else {CONFIG: config}
    (folder / "config.json").write_text(json.dumps(described))
    return folder


def linears(tensors: Mapping[str, Tensor]) -> list[str]:
    """The weights of the linears inside blocks."""
    return [name for name in tensors if name.endswith("proj.weight")]


@pytest.fixture
def float8(tiny: Checkpoints, tmp_path: Path) -> tuple[Path, Path]:
    """A folder in block FP8, and the dense folder that it stands for; blocks are cut at the end of a weight."""
    tensors = load_file(tiny() / WEIGHTS)
    stored, dense = dict(tensors), dict(tensors)
    for name in linears(tensors):
        stored[name], stored[f"{name}_scale_inv"], dense[name] = in_float8(tensors[name], (128, 128))
    config = BLOCKS | {"modules_to_not_convert": ["lm_head"]}
    return written(tmp_path / "fp8", tiny(), stored, config), written(tmp_path / "dense", tiny(), dense, None)


def changed(folder: Path, change: Callable[[dict[str, Tensor]], object], **config: Any) -> Path:
    """The same folder with other tensors and another quantization_config."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    described = json.loads((folder / "config.json").read_text())
    described[CONFIG] |= config
    (folder / "config.json").write_text(json.dumps(described))
    return folder


def refused(folder: Path, output: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        bitwright.quantize(Recipe(str(folder), "W4A16"), output)
    assert not output.exists() and not output.with_name(f"{output.name}.partial").exists()
    return str(error.value)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: str(way["method"]))
def test_float8_gives_the_bytes_of_the_dense_folder(
    way: dict[str, Any], float8: tuple[Path, Path], tmp_path: Path
) -> None:
    results = [
        bitwright.quantize(Recipe(str(model), "W4A16g32", exclude="*.0.mlp.up_proj", **way), tmp_path / f"out-{number}")
        for number, model in enumerate(float8)
    ]
    files = [tmp_path / "out-0", tmp_path / "out-1"]
    assert (files[0] / WEIGHTS).read_bytes() == (files[1] / WEIGHTS).read_bytes()
    assert (files[0] / "config.json").read_bytes() == (files[1] / "config.json").read_bytes()
    (note,) = (note for note in results[0].notes if "quantized already" in note)
    assert "(fp8, blocks of 128 x 128): weights are dequantized to bfloat16; activations are not" in note
    assert note in json.loads((files[0] / "bitwright.json").read_text())["notes"]
    assert results[0].bytes_in < results[1].bytes_in
    assert not any("quantized already" in note for note in results[1].notes)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: str(way["method"]))
@pytest.mark.parametrize(("format", "scheme"), [("gptq", "W4A16g32"), ("compressed-tensors", "W8A16"),
                                                ("awq", "W4A16g32"), ("bitwright", "W4A16g32ic")])  # fmt: skip
def test_codes_give_the_bytes_of_the_dense_folder(
    format: str, scheme: str, way: dict[str, Any], tiny: Checkpoints, tmp_path: Path
) -> None:
    bitwright.quantize(Recipe(str(tiny("float16")), scheme, format=format), tmp_path / "once")
    bitwright.export(tmp_path / "once", tmp_path / "dense", format="dense")
    once = bitwright.quantize(Recipe(str(tmp_path / "once"), "W3A16g32", **way), tmp_path / "a")
    bitwright.quantize(Recipe(str(tmp_path / "dense"), "W3A16g32", **way), tmp_path / "b")
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()
    assert any(f"({format}" in note and "lose twice" in note for note in once.notes)


def test_a_plan_says_so_too(float8: tuple[Path, Path]) -> None:
    assert any("quantized already (fp8" in note for note in bitwright.plan(Recipe(str(float8[0]), "W4A16g32")).notes)


def test_workers_and_a_quantized_output_layer(float8: tuple[Path, Path], tmp_path: Path) -> None:
    for number, model in enumerate(float8):
        recipe = Recipe(str(model), "W4A16g32", "easyquant", quantize_lm_head=True)
        bitwright.quantize(recipe, tmp_path / str(number), workers=2)
    assert (tmp_path / "0" / WEIGHTS).read_bytes() == (tmp_path / "1" / WEIGHTS).read_bytes()


def test_against_and_reference(float8: tuple[Path, Path], tmp_path: Path) -> None:
    bitwright.quantize(Recipe(str(float8[0]), "W8A16"), tmp_path / "out")
    verified = bitwright.verify(tmp_path / "out", float8[0])
    assert verified.passed and verified.largest_error is not None and verified.largest_error < 1e-3
    codes, dense = (bitwright.evaluate(tmp_path / "out", windows=2, seqlen=64, reference=f).measurement for f in float8)
    assert codes is not None and dense is not None and codes.kl_divergence == dense.kl_divergence


def test_inspect_looks_inside(float8: tuple[Path, Path]) -> None:
    inside = [bitwright.inspect(folder, sites=True).inside for folder in float8]
    assert inside[0] == inside[1] and inside[0]


@pytest.mark.parametrize("scales", ["tensor", "row", "flat rows"])
def test_scales_without_blocks(scales: str, float8: tuple[Path, Path], tiny: Checkpoints) -> None:
    weight = load_file(tiny() / WEIGHTS)[UP]
    codes, scale, dense = in_float8(weight, (192, 64) if scales == "tensor" else (1, 64))
    stored = {"tensor": scale.squeeze(), "row": scale, "flat rows": scale.flatten()}[scales]

    def change(tensors: dict[str, Tensor]) -> None:
        for name in linears(tensors):
            del tensors[f"{name}_scale_inv"]
            tensors[name] = tensors[name].to(torch.bfloat16)
        tensors.update({UP: codes, f"{UP}_scale": stored, f"{UP.removesuffix('weight')}input_scale": torch.ones(())})

    checkpoint = open_original(changed(float8[0], change, weight_block_size=None))
    assert isinstance(checkpoint, DequantizedCheckpoint) and checkpoint.note.endswith("their scales are left out")
    assert torch.equal(checkpoint.read(UP), dense) and checkpoint.entry(UP).dtype == torch.bfloat16
    assert torch.equal(checkpoint.read_slice(UP, 100, 107), dense[100:107])
    assert not any(name.endswith(("scale", "scale_inv")) for name in checkpoint.names)


@pytest.mark.parametrize(("block", "weights"), [
    ((1, 64), {"num_bits": 8, "type": "float", "strategy": "channel"}),
    ((128, 128), {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}),
])  # fmt: skip
def test_float8_of_compressed_tensors(
    block: tuple[int, int], weights: dict[str, Any], float8: tuple[Path, Path], tiny: Checkpoints
) -> None:
    codes, scale, dense = in_float8(load_file(tiny() / WEIGHTS)[UP], block)

    def change(tensors: dict[str, Tensor]) -> None:
        for name in linears(tensors):
            del tensors[f"{name}_scale_inv"]
            tensors[name] = tensors[name].to(torch.bfloat16)
        tensors.update({UP: codes, f"{UP}_scale": scale.to(torch.bfloat16)})

    group = {"targets": ["Linear"], "weights": weights, "input_activations": {"num_bits": 8, "dynamic": True}}
    described = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}
    folder = changed(float8[0], change, **described, weight_block_size=None)
    checkpoint = open_original(folder)
    assert isinstance(checkpoint, DequantizedCheckpoint)
    assert "(compressed-tensors float-quantized" in checkpoint.note and "activations are not" in checkpoint.note
    assert torch.allclose(checkpoint.read(UP).float(), dense.float(), rtol=0.01)


def test_fused_experts_are_read_one_by_one(float8: tuple[Path, Path]) -> None:
    stack = torch.randn(3, 48, 40, generator=torch.Generator().manual_seed(0))
    parts = [in_float8(expert, (32, 32)) for expert in stack]
    codes, scale, dense = (torch.stack([part[i] for part in parts]) for i in range(3))
    fused = {"x.experts.up": codes, "x.experts.up_scale_inv": scale}

    def change(tensors: dict[str, Tensor]) -> None:
        for name in linears(tensors):
            tensors[name] = tensors[name].float().to(torch.bfloat16)
            del tensors[f"{name}_scale_inv"]
        tensors.update(fused)

    checkpoint = open_original(changed(float8[0], change, weight_block_size=[32, 32]))
    assert torch.equal(checkpoint.read_slice("x.experts.up", 1, 2), dense[1:2])
    assert torch.equal(checkpoint.read("x.experts.up"), dense)


def test_our_own_stacks_are_read_one_by_one(tmp_path: Path) -> None:
    from bitwright.core.grid import Grid, Tile
    from bitwright.core.qtensor import QTensor
    from bitwright.formats.bitwright import cut, encode_stacked, read_stacked

    generator, grid, tile = torch.Generator().manual_seed(0), Grid.integers(4), Tile(1, 8)
    slices = [
        QTensor(
            torch.randint(0, 16, (6, 16), generator=generator, dtype=torch.uint8),
            torch.rand(6, 2, generator=generator),
            torch.randint(0, 16, (6, 2), generator=generator, dtype=torch.uint8),
            grid,
            tile,
            torch.arange(kept, dtype=torch.int32) * 3,
            torch.rand(kept, generator=generator),
        )
        for kept in (2, 0, 3)
    ]
    tensors = encode_stacked("x.experts.up", slices)
    for number, wanted in enumerate(slices):
        alone = cut(
            tensors, "x.experts.up", number, tensors.__getitem__, lambda name, start, stop: tensors[name][start:stop]
        )
        (expert,) = read_stacked(alone, "x.experts.up", grid)
        assert torch.equal(expert.dequantize(), wanted.dequantize())


def test_values_that_are_no_numbers_are_found(float8: tuple[Path, Path], tmp_path: Path) -> None:
    changed(float8[0], lambda tensors: tensors[f"{UP}_scale_inv"].fill_(float("inf")))
    with pytest.raises(CheckpointError, match=rf"'{UP}'.*NaN and \d+ infinite"):
        bitwright.quantize(Recipe(str(float8[0]), "W4A16"), tmp_path / "out")
    recipe = Recipe(str(float8[0]), "W4A16", **WAYS[1])
    with pytest.raises(CheckpointError, match=rf"'{UP}'.*NaN and \d+ infinite"):
        bitwright.quantize(recipe, tmp_path / "out")


@pytest.mark.parametrize(("change", "config", "says"), [
    (lambda t: t.update({f"{UP}_scale_inv": torch.ones(3, 1)}), {}, r"weight_scale_inv has shape \[3, 1\].*\[2, 1\]"),
    (lambda t: t.update({f"{UP}_scale_inv": torch.ones(2, 1, dtype=torch.uint8)}), {}, "is uint8"),
    (lambda t: t.pop(f"{UP}_scale_inv"), {}, "up_proj.weight is FP8 and has no scales"),
    (lambda t: t.pop(UP), {}, "are scales of a weight that is not there"),
    (lambda t: t.update({UP: t[UP].to(torch.bfloat16)}), {}, "are scales of a weight that is bfloat16"),
    (lambda t: t.update({UP: t[UP].flatten()}), {}, r"FP8 of shape \[12288\]"),
    (lambda t: t, {"weight_block_size": [128]}, r"says \[128\] for weight_block_size"),
    (lambda t: t, {"weight_block_size": [0, 128]}, r"says \[0, 128\] for weight_block_size"),
    (lambda t: t, {"weight_block_size": None}, r"without blocks needs \[1, 1\]"),
    (lambda t: t, {"quant_method": "bitsandbytes"}, r"quantized already \(bitsandbytes\); start from the full"),
    (lambda t: t, {"quant_method": "mxfp4"}, r"quantized already \(mxfp4\); start from the full"),
    (lambda t: t, {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
     r"quantized already \(compressed-tensors nvfp4-pack-quantized\); start from the full"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_what_cannot_be_read_is_refused_before_the_work(
    change: Callable[[dict[str, Tensor]], object],
    config: dict[str, Any],
    says: str,
    float8: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    message = refused(changed(float8[0], change, **config), tmp_path / "out")
    assert re.search(says, message), message


def test_float8_without_a_word_in_config_json_is_refused(float8: tuple[Path, Path], tmp_path: Path) -> None:
    described = json.loads((float8[0] / "config.json").read_text())
    del described[CONFIG]
    (float8[0] / "config.json").write_text(json.dumps(described))
    assert "float8_e4m3fn" in refused(float8[0], tmp_path / "out")


def test_a_dense_original_has_no_note(tiny: Checkpoints) -> None:
    assert Source.open(tiny()).note is None
