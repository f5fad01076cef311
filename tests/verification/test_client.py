"""A folder is loaded as its client would load it before it is published, and verify compares what clients compute."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import Checkpoints, loaded_with_info
from transformers import AutoConfig, AutoModelForCausalLM

import bitwright
from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.errors import OutputError
from bitwright.core.recipe import Recipe
from bitwright.model.loadable import config_in, faults

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "num_experts_per_tok": 2,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "rwkv": {"attention_hidden_size": 64, "context_length": 64},
    "phimoe": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 16},
    "granitemoe": {"num_local_experts": 4},
    "jetmoe": {"num_local_experts": 4, "kv_channels": 32},
    "flex_olmo": {"num_experts": 4},
    "hrm_text": {"num_layers_per_stack": 2, "H_cycles": 1, "L_cycles": 1, "head_dim": 16},
}
Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder_of(tiny: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """``folder_of(model_type)``: a small random model as transformers saves it; nobody writes to it."""

    def of(kind: str) -> Path:
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **(SIZES | MODELS[kind]))
        folder = tmp_path_factory.mktemp(kind) / "model"
        AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
        shutil.copy(tiny() / "tokenizer.json", folder)
        return folder

    return of


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_published_loads_and_passes(kind: str, folder_of: Folders, tmp_path: Path) -> None:
    original = folder_of(kind)
    result = bitwright.quantize(Recipe(str(original), "W4A16g32", "rtn"), tmp_path / "out")
    assert result.verified.endswith("loads in transformers")
    _, report = loaded_with_info(tmp_path / "out")
    assert not any(report.values())
    for against in (None, original):
        found = bitwright.verify(tmp_path / "out", against)
        assert found.passed, [check for check in found.checks if not check.passed]


@pytest.mark.parametrize("kind", ["rwkv"])
def test_a_format_that_the_client_cannot_load(kind: str, folder_of: Folders, tmp_path: Path) -> None:
    original = folder_of(kind)
    with pytest.raises(OutputError, match=r"no attribute 'weight'.*--format bitwright or --format dense"):
        bitwright.quantize(Recipe(str(original), "W4A16g32", "rtn", "compressed-tensors"), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    result = bitwright.quantize(Recipe(str(original), "W4A16g32", "rtn"), tmp_path / "out")
    assert result.format == "bitwright" and "cannot load compressed-tensors" in result.fallbacks[0]
    with pytest.raises(OutputError, match="no attribute 'weight'"):
        bitwright.export(tmp_path / "out", tmp_path / "exported", format="compressed-tensors")


def test_faults_are_named(folder_of: Folders, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(folder_of("phimoe"))
    config = config_in(checkpoint.folder)
    assert config is not None
    sound = faults(config, checkpoint.names)
    assert not sound.unclaimed and not sound.empty
    lost = "model.norm.weight"
    names = [*(name for name in checkpoint.names if name != lost), "model.layers.0.extra.weight_packed"]
    assert "model.layers.0.extra.weight_packed has no place" in str(faults(config, names).beyond(sound))
    assert f"no tensor fills {lost}" in str(faults(config, names[:-1]).beyond(sound))
    assert faults(config, names).beyond(faults(config, names)) is None  # the original's own
