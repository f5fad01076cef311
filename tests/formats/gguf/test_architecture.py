"""What config.json says, in GGUF's words; and what llama.cpp would compute otherwise, refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.formats.gguf.conftest import SIZES, Models
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import bitwright
from bitwright.core.errors import RecipeError
from bitwright.core.format import WriteOptions
from bitwright.formats import gguf
from bitwright.formats.gguf.architecture import architecture

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config(kind: str = "llama", **changes: Any) -> dict[str, Any]:
    return SIZES | {"model_type": kind, "intermediate_size": 96, "rms_norm_eps": 1e-5} | changes


def entries(kind: str = "llama", **changes: Any) -> dict[str, Any]:
    return {entry.key: entry.value for entry in architecture(config(kind, **changes)).entries()}


@pytest.mark.parametrize(
    "kind, name", [("llama", "llama"), ("mistral", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")]
)
def test_dimensions(kind: str, name: str) -> None:
    found = entries(kind, head_dim=32)
    assert found[f"{name}.attention.key_length"] == found[f"{name}.rope.dimension_count"] == 32
    assert found[f"{name}.attention.layer_norm_rms_epsilon"] == 1e-5
    assert found[f"{name}.context_length"] == 128
    assert found[f"{name}.vocab_size"] == 512
    unsaid = entries(kind, head_dim=None, num_key_value_heads=None)
    assert (unsaid[f"{name}.attention.key_length"], unsaid[f"{name}.attention.head_count_kv"]) == (16, 4)


def test_where_the_rotary_base_stands() -> None:
    assert entries()["llama.rope.freq_base"] == 10000
    assert entries(rope_theta=5e5)["llama.rope.freq_base"] == 5e5
    assert entries(rope_parameters={"rope_type": "default", "rope_theta": 1e6})["llama.rope.freq_base"] == 1e6


def test_stretched_contexts() -> None:
    found = entries(rope_scaling={"type": "linear", "factor": 2.0})
    assert (found["llama.rope.scaling.type"], found["llama.rope.scaling.factor"]) == ("linear", 2)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    found = entries("qwen2", rope_scaling=yarn, rope_theta=1e6)
    assert (found["qwen2.rope.scaling.type"], found["qwen2.rope.scaling.original_context_length"]) == ("yarn", 32)


def test_llama_3_divides_frequencies_as_transformers_does() -> None:
    found = architecture(config(rope_parameters=LLAMA3, head_dim=128)).rope_factors()
    theirs = LlamaConfig(head_dim=128, rope_parameters=LLAMA3)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, torch.device("cpu"))
    plain = 500000.0 ** (-torch.arange(0, 128, 2) / 128)
    assert found is not None
    torch.testing.assert_close(plain / found, scaled, rtol=1e-5, atol=0)
    assert found[[0, -1]].tolist() == [1, 32]
    assert architecture(config()).rope_factors() is None


def test_a_window_bounds_the_context() -> None:
    assert entries("mistral", sliding_window=64)["llama.context_length"] == 64
    assert entries("mistral", sliding_window=None)["llama.context_length"] == 128
    assert entries("qwen2", sliding_window=64, use_sliding_window=False)["qwen2.context_length"] == 128
    assert entries("qwen2", sliding_window=64, use_sliding_window=True)["qwen2.context_length"] == 64


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "another architecture": ("model_type 'opt'", {"model_type": "opt"}),
    "no size": ("lacks something", {"hidden_size": None}),
    "activation": ("activation is gelu", {"hidden_act": "gelu"}),
    "part of a head": ("only a part", {"partial_rotary_factor": 0.5}),
    "dynamic": ("scaled as 'dynamic'", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    "yarn of its own": ("yarn with attention_factor", {"rope_scaling": {"type": "yarn", "attention_factor": 2.0}}),
    "llama3 elsewhere": ("no place for llama3", {"model_type": "qwen2", "rope_scaling": LLAMA3}),
    "other layers": ("layers of types", {"layer_types": ["linear_attention"]}),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str, tmp_path: Path) -> None:
    says, changes = REFUSED[what]
    with pytest.raises(RecipeError, match=says):
        gguf.check(config() | changes, tmp_path, WriteOptions())


def test_embeddings_of_another_type(model: Models) -> None:
    with pytest.raises(RecipeError, match=r"no embeddings 'f61'; did you mean f16\? Known: f16, q4_0, q8_0"):
        gguf.check(config(), model("tied"), WriteOptions(embeddings="f61"))


def test_quantize_refuses_before_any_weight_is_read(model: Models, tmp_path: Path) -> None:
    folder = model("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    with pytest.raises(RecipeError, match="scaled as 'dynamic'"):
        bitwright.quantize(bitwright.Recipe(str(folder), "W4A16g32", "rtn", format="gguf"), tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []
