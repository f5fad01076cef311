"""What plain transformers makes of experts in compressed-tensors: right, refused, or silently at random.

This is transformers' doing, in the locked version; docs/formats/compressed-tensors.md has the rule that follows.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import loaded_with_info
from tests.plugin.experts import save_original, write
from transformers import LlamaConfig

import bitwright
from bitwright.core.decisions import LinearDecision
from bitwright.core.errors import CheckpointError
from bitwright.core.quantized import WrittenModel
from bitwright.core.scheme import Scheme
from bitwright.families import llama
from bitwright.formats import compressed_tensors, dense
from bitwright.steps.apply import quantize_linear

TOKENS = torch.arange(0, 250, 5)[None]
ALL, ATTENTION = r"(_proj|\.w[123])\.weight$", r"self_attn.*_proj\.weight$"


def written(model: str, scheme: str, linears: str, tmp_path: Path) -> tuple[Path, Path]:
    """A folder in compressed-tensors and its dense counterpart, the linears that the pattern finds quantized."""
    asked, dtype = Scheme.parse(scheme), torch.float32
    save_original(model, tmp_path / "original", dtype)
    whole = load_file(tmp_path / "original" / "model.safetensors")
    matrices = {name: t for name, t in whole.items() if re.search(linears, name) and t.dim() == 2}
    quantized = {name: quantize_linear(t, LinearDecision(), asked, dtype) for name, t in matrices.items()}
    config = compressed_tensors.quantization_config(WrittenModel(asked, llama.family(LlamaConfig().to_dict()), dtype))
    assert config is not None
    config["ignore"] = ["lm_head", "re:.*router$"]
    for room, folder, said in ((compressed_tensors, "packed", config), (dense, "dense", None)):
        tensors = {name: t for name, t in whole.items() if name not in quantized}
        for name, q in quantized.items():
            tensors |= room.encode(name.removesuffix(".weight"), q)
        write(tmp_path / "original", tmp_path / folder, tensors, said)
    return tmp_path / "packed", tmp_path / "dense"


def load(folder: Path) -> tuple[Any, set[str]]:
    """Logits, and the parameters that transformers made up."""
    model, info = loaded_with_info(folder, torch.float32)
    with torch.inference_mode():
        return model.eval()(TOKENS).logits, set(info["missing_keys"])


@pytest.mark.parametrize("scheme", ["W4A16g32sym", "W3A16sym", "W8A16g32sym"])
@pytest.mark.parametrize("model", ["Mixtral", "Qwen3Moe"])
def test_symmetric_experts_one_by_one_are_right(model: str, scheme: str, tmp_path: Path) -> None:
    packed, plain = written(model, scheme, ALL, tmp_path)
    (found, missing), (want, _) = load(packed), load(plain)
    assert not missing and torch.equal(found, want)


def test_asymmetric_experts_are_an_error(tmp_path: Path) -> None:
    packed, _ = written("Mixtral", "W4A16g32", ALL, tmp_path)
    with pytest.raises(RuntimeError, match="issues during automatic conversion of the weights"):
        load(packed)


def test_experts_one_by_one_that_are_not_packed_are_made_up(tmp_path: Path) -> None:
    packed, _ = written("Mixtral", "W4A16g32sym", ATTENTION, tmp_path)
    missing = load(packed)[1]
    assert len(missing) == 4 and all("experts" in name for name in missing)
    with pytest.raises(CheckpointError, match=r"has no weights for model\.layers\.0\.mlp\.experts\.down_proj"):
        bitwright.load(packed)


@pytest.mark.parametrize("scheme", ["W4A16g32sym", "W4A16g32"])
@pytest.mark.parametrize("model", ["GptOss", "GraniteMoe"])
def test_fused_experts_that_are_not_packed_are_right(model: str, scheme: str, tmp_path: Path) -> None:
    packed, plain = written(model, scheme, ATTENTION, tmp_path)
    (found, missing), (want, _) = load(packed), load(plain)
    assert not missing and torch.equal(found, want)


def test_llama4_with_fused_experts_cannot_be_loaded(tmp_path: Path) -> None:
    """Transformers expects its experts one by one in this format, makes them up, and may trip over what it made."""
    packed, _ = written("Llama4", "W4A16g32sym", ALL, tmp_path)
    with pytest.raises(CheckpointError, match=r"(?:has no weights for .*experts|transformers cannot load .*packed)"):
        bitwright.load(packed)
