"""Folders in gptq and awq: quantized, inspected, loaded without gptqmodel, evaluated."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import Checkpoints
from tests.formats.conftest import LINEARS, tensors_of
from tests.golden import gptq_page
from transformers import AutoModelForCausalLM

import bitwright
from bitwright.core.errors import CheckpointError, RecipeError
from bitwright.formats import QuantizedFolder

TOKENS = torch.arange(0, 250, 7)[None]
WIDE = {"num_key_value_heads": 4}
"""Key and value projections with 64 outputs: the words of 32 are filled."""


def made(model: Path, folder: Path, scheme: str, format: str, **also: Any) -> Path:
    bitwright.quantize(bitwright.Recipe(str(model), scheme, format=format, **also), folder)
    return folder


@pytest.mark.parametrize(
    ("format", "scheme", "dtype"),
    [("gptq", "W4A16g32", "bfloat16"), ("gptq", "W3A16sym", "float16"), ("gptq", "W8A16g64sym", "float32"),
     ("gptq", "W2A16g16", "float32"), ("awq", "W4A16g32", "bfloat16"), ("awq", "W4A16", "float32")],
)  # fmt: skip
def test_loaded_weights_are_those_of_the_page(
    format: str, scheme: str, dtype: str, tiny: Checkpoints, tmp_path: Path
) -> None:
    out = made(tiny(dtype, **WIDE), tmp_path / "out", scheme, format)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    stored = {n: (t.double() if t.is_floating_point() else t).numpy() for n, t in tensors_of(out).items()}
    model = bitwright.load(out, dtype="float32")
    for name in LINEARS:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        if format == "gptq":
            want = gptq_page.gptq_weight(stored, name, config)
        else:
            want = gptq_page.awq_weight(stored, name, config["group_size"])
        assert torch.equal(weight, torch.from_numpy(want).float()), name
    original = AutoModelForCausalLM.from_pretrained(tiny(dtype, **WIDE), dtype=torch.float32)
    assert torch.equal(model.get_parameter("model.norm.weight"), original.get_parameter("model.norm.weight"))
    error = (model(TOKENS).logits - original(TOKENS).logits).std() / original(TOKENS).logits.std()
    assert error < {"2": 1.5, "3": 0.8, "4": 0.5, "8": 0.05}[scheme[1]]


def test_evaluated_and_inspected(tiny: Checkpoints, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a line about nothing much; " * 40)
    out = made(tiny("float16", **WIDE), tmp_path / "out", "W4A16g32", "gptq")
    beside = made(tiny("float16", **WIDE), tmp_path / "beside", "W4A16g32", "compressed-tensors")
    one, other = (
        bitwright.evaluate(folder, str(text), seqlen=32, windows=4, reference=tiny("float16", **WIDE))
        for folder in (out, beside)
    )
    assert one.measurement is not None and other.measurement is not None
    assert one.measurement.kl_divergence == pytest.approx(other.measurement.kl_divergence, rel=1e-4)
    assert (one.loader, other.loader) == ("bitwright", "transformers")
    seen = {row.name: row for row in bitwright.inspect(out).linears}
    up = seen["model.layers.0.mlp.up_proj"]
    assert (up.shape, up.tile, up.dtype) == ((192, 64), (1, 32), "packed")
    assert up.bits_per_weight == pytest.approx(4 + (16 + 4) / 32 + 32 / 192)  # g_idx: 32 bits per input


def test_tied_embeddings_and_the_output_layer(tiny: Checkpoints, tmp_path: Path) -> None:
    model = bitwright.load(made(tiny("float16", tied=True, **WIDE), tmp_path / "tied", "W4A16g32", "gptq"))
    assert model.get_submodule("lm_head").weight is model.get_parameter("model.embed_tokens.weight")
    out = made(tiny("float16", tied=True, **WIDE), tmp_path / "head", "W4A16g32", "gptq", quantize_lm_head=True)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["lm_head"] is True
    head = bitwright.load(out).get_submodule("lm_head").weight
    assert isinstance(head, torch.Tensor)
    assert torch.equal(head, QuantizedFolder.open(out).read("lm_head").dequantize(torch.float32))


def test_a_run_with_text_goes_on_from_what_it_wrote(tiny: Checkpoints, tmp_path: Path) -> None:
    """Blocks that are finished are read back through the format, in float16, into a bfloat16 model."""
    text = tmp_path / "text.txt"
    text.write_text("a line about nothing much; " * 400)
    out = made(
        tiny("bfloat16", **WIDE), tmp_path / "out", "W3A16g32", "gptq", method="gptq", calibration=str(text), seqlen=32,
        samples=4,
    )  # fmt: skip
    found = QuantizedFolder.open(out)
    assert found.read(LINEARS[0]).scale.dtype == torch.float16
    assert bitwright.load(out)(TOKENS).logits.isfinite().all()


def test_sizes_that_do_not_fit_are_refused_by_name(tiny: Checkpoints, tmp_path: Path) -> None:
    model = tiny("float16", intermediate_size=72)
    with pytest.raises(RecipeError, match=r"72 .* features are no multiple of 32.*--exclude"):
        made(model, tmp_path / "out", "W4A16", "gptq")


def test_channels_out_of_order_are_refused_as_what_they_are(tiny: Checkpoints, tmp_path: Path) -> None:
    out = made(tiny("float16", **WIDE), tmp_path / "out", "W4A16g32", "gptq")
    tensors = load_file(out / "model.safetensors")
    tensors[f"{LINEARS[0]}.g_idx"] = tensors[f"{LINEARS[0]}.g_idx"].flip(0).contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"q_proj: its input channels are sorted into groups out of order"):
        bitwright.load(out)


@pytest.mark.parametrize("leaf", ["qweight", "qzeros", "scales"])
def test_a_damaged_folder_is_refused(leaf: str, tiny: Checkpoints, tmp_path: Path) -> None:
    out = made(tiny("float16", **WIDE), tmp_path / "out", "W4A16g32", "gptq")
    tensors = load_file(out / "model.safetensors")
    tensors[f"{LINEARS[0]}.{leaf}"] = tensors[f"{LINEARS[0]}.{leaf}"][:, :-3].contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"q_proj do not fit together.*the folder is damaged"):
        bitwright.load(out)
