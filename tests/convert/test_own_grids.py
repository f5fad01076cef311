"""Schemes named after engines' grids, from the recipe to the loaded folder, with every method."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.checkpoint.conftest import Killed
from tests.conftest import Checkpoints

import bitwright
from bitwright import Recipe
from bitwright.core.errors import CheckpointError, UserError
from bitwright.core.progress import Progress

TOKENS = torch.arange(0, 250, 7)[None]
Q = "model.layers.0.self_attn.q_proj"


def recipe(source: Path, scheme: str, method: str, text: Path | None) -> Recipe:
    epochs = 1 if {"lwc", "lsq", "pact"} & set(method.split("+")) else None
    free = Recipe(str(source), scheme, method)
    return free if text is None else free.changed(calibration=str(text), samples=4, seqlen=32, epochs=epochs)


@torch.inference_mode()
def divergence(folder: Path, source: Path) -> float:
    wanted, found = (bitwright.load(path)(TOKENS).logits.log_softmax(-1) for path in (source, folder))
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


@pytest.mark.parametrize("method", ["rtn", "easyquant", "gptq", "lwc", "lwc+gptq", "awq", "lsq", "pact"])
def test_every_method_works_on_them(method: str, tiny: Checkpoints, text: Path, tmp_path: Path) -> None:
    source, free = tiny(), method in ("rtn", "easyquant")
    asked = recipe(source, "mlc:q3f16_1", method, None if free else text)
    if method == "easyquant":
        asked = Recipe(str(source), "mlc:q3f16_1", method, outliers="0")
    result = bitwright.quantize(asked, tmp_path / "out")
    assert (result.scheme, result.format) == ("mlc:q3f16_1", "bitwright")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    scale = tensors[f"{Q}.weight_scale"]
    assert (scale.dtype, tuple(scale.shape)) == (torch.float16, (64, 2))
    assert (scale < 0).any() and (scale > 0).any()
    row = next(row for row in bitwright.inspect(tmp_path / "out").linears if row.name == Q)
    assert (row.tile, row.bits_per_weight) == ((1, 40), 3 + 2 * 16 / 64)  # 64 columns of 3 bits are whole words
    assert divergence(tmp_path / "out", source) < 1.5


THREE = (36864 * (3 + 2 * 16 / 64) + 12288 * (3 + 5 * 16 / 192)) / 49152
"""All but down_proj have 64 columns, which are two groups of 40; its 192 are five."""


@pytest.mark.parametrize(("scheme", "bits"), [("mlc:q4f16_1", 4.5), ("mlc:q3f16_1", THREE), ("mlc:q2f16_1", 2.25)])
def test_plan_and_result_and_disk_agree(scheme: str, bits: float, tiny: Checkpoints, tmp_path: Path) -> None:
    asked = Recipe(str(tiny()), scheme, "rtn")
    planned, result = bitwright.plan(asked), bitwright.quantize(asked, tmp_path / "out")
    assert planned.bits_per_weight == pytest.approx(bits)
    assert result.bits_per_weight == pytest.approx(bits)
    stored = load_file(tmp_path / "out" / "model.safetensors").values()
    assert planned.bytes_out == sum(tensor.numel() * tensor.element_size() for tensor in stored)
    assert str(result.scheme) == planned.scheme == scheme


def test_packed_and_dense_are_one_model(tiny: Checkpoints, tmp_path: Path) -> None:
    source = tiny("float32")
    bitwright.quantize(Recipe(str(source), "mlc:q3f16_1", "rtn"), tmp_path / "packed")
    bitwright.quantize(Recipe(str(source), "mlc:q3f16_1", "rtn", format="dense"), tmp_path / "dense")
    with torch.inference_mode():
        packed, dense = (bitwright.load(tmp_path / name)(TOKENS).logits for name in ("packed", "dense"))
    assert torch.equal(packed, dense)
    bitwright.load(tmp_path / "packed").save_pretrained(tmp_path / "again")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "again"))
    assert {n: t.tolist() for n, t in one.items()} == {n: t.tolist() for n, t in two.items()}


@pytest.mark.parametrize("change", [torch.zeros_like, lambda t: t + 1])
def test_a_tile_that_lies_is_one_clear_error(
    change: Callable[[torch.Tensor], torch.Tensor], tiny: Checkpoints, tmp_path: Path
) -> None:
    bitwright.quantize(Recipe(str(tiny()), "mlc:q3f16_1", "rtn"), tmp_path / "out")
    folder = Path(shutil.copytree(tmp_path / "out", tmp_path / "damaged"))
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{Q}.weight_tile"] = change(tensors[f"{Q}.weight_tile"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{Q}.weight_tile says .*, not \[1, 40\]"):
        bitwright.load(folder)


def test_a_killed_run_goes_on(tiny: Checkpoints, text: Path, tmp_path: Path) -> None:
    """The finished block is read back from its part, its last groups cut short as they were."""
    asked = recipe(tiny(), "mlc:q3f16_1", "gptq", text)
    bitwright.quantize(asked, tmp_path / "whole")

    def kill(progress: Progress) -> None:
        if progress.unit == "model.layers.1":
            raise Killed

    with pytest.raises(Killed):
        bitwright.quantize(asked, tmp_path / "out", listener=kill)
    assert bitwright.quantize(asked, tmp_path / "out").resumed > 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert {n: t.tolist() for n, t in one.items()} == {n: t.tolist() for n, t in two.items()}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"format": "compressed-tensors"},
            "format compressed-tensors cannot hold the grid of an engine, which scheme mlc:q4f16_1",
        ),
        ({"method": "adadim", "calibration": "builtin"}, "scheme mlc:q4f16_1 fixes the axis"),
        ({"method": "easyquant", "axis": "auto"}, "scheme mlc:q4f16_1 fixes the axis"),
        ({"scheme": "mlc:q5f16_1"}, "nearest valid scheme is mlc:q"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], says: str, tiny: Checkpoints) -> None:
    with pytest.raises(UserError, match=says):
        bitwright.plan(Recipe(**{"model": str(tiny()), "scheme": "mlc:q4f16_1", "method": "rtn"} | changes))


def test_the_account_names_the_scheme(tiny: Checkpoints, tmp_path: Path) -> None:
    bitwright.quantize(Recipe(str(tiny()), "mlc:q4f16_1", "rtn"), tmp_path / "out")
    account = json.loads((tmp_path / "out" / "bitwright.json").read_text())
    assert (account["scheme"], account["format"]) == ("mlc:q4f16_1", "bitwright")
    assert bitwright.inspect(tmp_path / "out").scheme == "mlc:q4f16_1"
