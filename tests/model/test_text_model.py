"""A text model inside of another: values of ``text_config``, names as engines spell them, files of processors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import save_tokenizer
from transformers import AutoModelForCausalLM

import bitwright
from bitwright.core.recipe import Recipe
from bitwright.model.config import text_config
from bitwright.model.source import open_checkpoint

TEXT = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
PROCESSORS = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "image_processor_config.json", "feature_extractor.json", "chat_template.jinja",
)  # fmt: skip


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3.5 with its image encoder, and with a layer for several tokens that transformers passes over."""
    from transformers.models.qwen3_5 import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("text-model") / "model"
    torch.manual_seed(0)
    config = Qwen3_5Config(text_config=TEXT, vision_config=VISION, tie_word_embeddings=False)
    model: Any = Qwen3_5ForConditionalGeneration(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["mtp.fc.weight"] = torch.zeros(64, 128, dtype=torch.bfloat16)
    tensors["mtp.norm.weight"] = torch.ones(64, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(folder)
    for name in PROCESSORS:
        (folder / name).write_text("{}")
    return folder


@pytest.fixture(scope="module")
def mixed(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text-model") / "mixed"
    others = {"*.down_proj": "W8A16g32sym"}
    bitwright.quantize(Recipe(str(original), "W4A16g32sym", method="rtn", scheme_for=others), folder)
    return folder


def config_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_what_is_not_quantized_is_ignored_in_every_spelling(mixed: Path) -> None:
    """The text class of transformers has names without ``language_model``, vLLM with it; and linears of ``mtp``."""
    ignored = config_of(mixed)["ignore"]
    gate = "layers.0.linear_attn.in_proj_a"
    assert {f"model.{gate}", f"model.language_model.{gate}", "lm_head", "mtp.fc"} <= {*ignored}
    assert "mtp.norm" not in ignored and len(ignored) == len({*ignored})


def test_linears_with_schemes_of_their_own_are_named_in_every_spelling(mixed: Path) -> None:
    targets = config_of(mixed)["config_groups"]["group_1"]["targets"]
    down = [f"layers.{n}.mlp.down_proj" for n in range(2)]
    assert {*targets} == {f"{prefix}{name}" for name in down for prefix in ("model.", "model.language_model.")}


def test_transformers_loads_it_as_it_was_quantized(mixed: Path) -> None:
    plain: Any = AutoModelForCausalLM
    model = plain.from_pretrained(mixed, dtype=torch.float32)
    assert type(model).__name__ == "Qwen3_5ForCausalLM"
    assert all(check.passed for check in bitwright.verify(mixed).checks)


def test_evaluate_reads_the_text_models_own_values(original: Path, mixed: Path, text: Path) -> None:
    """vocab_size and max_position_embeddings ended in a traceback."""
    assert text_config(open_checkpoint(mixed)).vocab_size == 256
    measured = bitwright.evaluate(mixed, str(text), windows=1, reference=original).measurement
    assert measured is not None and measured.kl_divergence is not None


def test_the_files_of_its_processors_come_along(mixed: Path) -> None:
    assert all((mixed / name).is_file() for name in PROCESSORS)
