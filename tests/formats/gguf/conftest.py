"""Tiny models of the architectures that GGUF files are written for, each with a tokenizer of its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.formats.gguf import trained
from transformers import AutoConfig, AutoModelForCausalLM

import bitwright

Models = Callable[..., Path]
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "llama-bpe", {}),
    "tied": ("llama", "gpt-2", {"tie_word_embeddings": True}),
    "biased": ("llama", "gpt-2", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    "mistral": ("mistral", "spm", {"sliding_window": None, "vocab_size": 600}),
    "qwen2": ("qwen2", "qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", "qwen2", {"head_dim": 128}),
}
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """``model("qwen3", **config)``: a folder in bfloat16, made once; nobody writes to it."""
    made: dict[str, Path] = {}

    def found(name: str, **changes: Any) -> Path:
        key = repr((name, sorted(changes.items())))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("gguf") / name
            _save(made[key], name, changes)
        return made[key]

    return found


@pytest.fixture(scope="session")
def quantized(model: Models, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """``quantized("qwen3", "W4A16g32sym")``: the same, rounded to nearest, in the bitwright format."""
    made: dict[tuple[str, ...], Path] = {}

    def found(name: str, scheme: str, method: str = "rtn", format: str = "bitwright", head: bool = False) -> Path:
        key = (name, scheme, method, format, str(head))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("quantized") / "folder"
            recipe = bitwright.Recipe(str(model(name)), scheme, method, format=format, quantize_lm_head=head)
            bitwright.quantize(recipe, made[key])
        return made[key]

    return found


def _save(folder: Path, name: str, changes: dict[str, Any]) -> None:
    kind, tokenizer, own = KINDS[name]
    config = AutoConfig.for_model(kind, **(SIZES | own | changes))
    made = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter_name, parameter in made.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if "norm" in parameter_name:
                parameter.copy_(1 + 0.2 * drawn)
            elif parameter.dim() == 1:
                parameter.copy_(0.3 * drawn)
            else:
                parameter.copy_(drawn * (0.5 if "embed" in parameter_name else 1.4 / parameter.shape[1] ** 0.5))
    made.bfloat16().save_pretrained(folder)
    if tokenizer == "spm":
        trained.byte_fallback(folder)
    else:
        trained.byte_level(folder, tokenizer, bos=tokenizer == "llama-bpe")
