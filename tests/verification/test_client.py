"""A folder is loaded as its client would load it before it is published, and verify compares what clients compute."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import Checkpoints, changed, loaded_with_info
from transformers import AutoConfig, AutoModelForCausalLM

import bitwright
from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.errors import CheckpointError, OutputError
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
    "hrm_text": {"num_layers_per_stack": 2, "H_cycles": 2, "L_cycles": 3, "num_hidden_layers": 16, "head_dim": 16},
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


def edited(folder: Path, place: Path, **config: Any) -> Path:
    """A copy of a folder whose config.json says something else; ``...`` removes a key."""
    copy = Path(shutil.copytree(folder, place / "edited"))
    stated = json.loads((copy / "config.json").read_text()) | config
    stated = {key: value for key, value in stated.items() if value is not ...}
    (copy / "config.json").write_text(json.dumps(stated))
    return copy


def refused(original: Path, place: Path, says: str, method: str = "rtn", format: str | None = None) -> None:
    more: dict[str, Any] = {} if method == "rtn" else {"calibration": "builtin", "samples": 1, "seqlen": 16}
    with pytest.raises(CheckpointError, match=says):
        bitwright.quantize(Recipe(str(original), "W4A16g32", method, format, **more), place / "out")
    assert not (place / "out").exists()


def test_an_original_that_computes_no_numbers(folder_of: Folders, tmp_path: Path) -> None:
    """Its copy does not either, and is not published for that."""
    original = edited(folder_of("granitemoe"), tmp_path, logits_scaling=0.0)
    refused(original, tmp_path, "edited is at fault, and what was written of it is not published: .* NaN or infinite")


@pytest.mark.parametrize(("method", "format"), [("rtn", None), ("rtn", "gguf"), ("gptq", None)])
def test_an_original_that_is_described_and_computes_no_numbers(
    method: str, format: str | None, tiny: Checkpoints, tmp_path: Path
) -> None:
    original = changed(
        tiny(eos_token_id=2), tmp_path / "edited", lambda tensors: tensors["model.norm.weight"].fill_(3e38)
    )
    refused(original, tmp_path, "edited is at fault, .* NaN or infinite", method, format)


def test_an_original_that_cannot_run_with_a_cache(tiny: Checkpoints, tmp_path: Path) -> None:
    """A window of 0 tokens, which only a run with a cache meets, as ``generate`` has one."""
    original = edited(tiny(), tmp_path, model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=0)
    refused(original, tmp_path, "edited is at fault, .*it loads, but cannot run")


def test_an_original_without_a_tensor_that_its_model_needs(folder_of: Folders, tmp_path: Path) -> None:
    original = changed(folder_of("granitemoe"), tmp_path / "edited", lambda tensors: tensors.pop("model.norm.weight"))
    refused(original, tmp_path, "edited is at fault, .*no tensor fills model.norm.weight")


def test_an_original_with_other_shapes_than_its_config(folder_of: Folders, tmp_path: Path) -> None:
    original = edited(folder_of("granitemoe"), tmp_path, num_key_value_heads=4)
    refused(original, tmp_path, r"calls for model.layers.0.self_attn.k_proj.weight of shape \[64, 64\]")


@pytest.mark.parametrize(("config", "says"), [
    ({"model_type": "t5"}, "has no causal language model of 't5', and architectures names no class of it"),
    ({"model_type": "clip", "architectures": ...}, "has no causal language model of 'clip'"),
    ({"model_type": "../../x"}, "'../../x', which is no name of an architecture"),
    ({"model_type": "auto"}, "'auto', which is a part of transformers and no architecture"),
    ({"model_type": "gemma3", "text_config": "x"}, "transformers knows 'gemma3', and cannot read this one"),
    ({"model_type": "phi3", "hidden_act": "nope"}, "transformers cannot build this Phi3ForCausalLM: KeyError: .*nope"),
])  # fmt: skip
def test_a_config_that_is_wrong(config: dict[str, Any], says: str, tiny: Checkpoints, tmp_path: Path) -> None:
    refused(edited(tiny(), tmp_path, **config), tmp_path, says)


def test_an_architecture_that_nobody_knows_is_not_seen(tiny: Checkpoints, tmp_path: Path) -> None:
    original = edited(tiny(), tmp_path, model_type="brand_new", architectures=["BrandNewForCausalLM"])
    result = bitwright.quantize(Recipe(str(original), "W4A16g32", "rtn"), tmp_path / "out")
    assert result.verified.endswith("whether it loads is not seen: transformers does not know 'brand_new'")
    assert bitwright.verify(tmp_path / "out", original).passed


def test_an_unknown_architecture_with_a_known_class_is_no_yes(tiny: Checkpoints, tmp_path: Path) -> None:
    original = edited(tiny(), tmp_path, model_type="lama")
    result = bitwright.quantize(Recipe(str(original), "W4A16g32", "rtn"), tmp_path / "out")
    assert "architectures names a class of 'llama': if that is what it is, say so in config.json" in result.verified
    found = bitwright.verify(tmp_path / "out", original)
    assert not found.passed and not found.failed


@pytest.mark.parametrize("kind", ["llama", "granitemoe"])
def test_attention_of_a_package_that_is_missing(
    kind: str, folder_of: Folders, tiny: Checkpoints, tmp_path: Path
) -> None:
    folder = tiny() if kind == "llama" else folder_of(kind)
    original = edited(folder, tmp_path, attn_implementation="flash_attention_2")
    result = bitwright.quantize(Recipe(str(original), "W4A16g32", "rtn"), tmp_path / "out")
    assert "whether it loads is not seen: config.json asks for attn_implementation 'flash_att" in result.verified
    found = bitwright.verify(tmp_path / "out", original)
    assert found.passed and found.checks[-1].passed is None and "flash_attention_2" in found.checks[-1].found


def test_verify_refuses_a_name_that_is_none(tiny: Checkpoints, tmp_path: Path) -> None:
    bitwright.quantize(Recipe(str(tiny()), "W4A16g32", "rtn"), tmp_path / "out")
    found = bitwright.verify(edited(tmp_path / "out", tmp_path, model_type="../x"), tiny())
    assert not found.passed and "no name of an architecture: no program can load this" in found.checks[-1].found
