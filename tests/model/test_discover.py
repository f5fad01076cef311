"""Which tensors are linears, told from names and shapes: against what transformers makes of them, and by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import Checkpoints
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from bitwright.model.discover import EMPTY, UNNAMED, discover, embedding, head, in_order

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
ORDINARY = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_neox", "olmo2", "stablelm",
            "starcoder2", "cohere", "granite", "glm4", "smollm3", "falcon", "bloom", "opt"]  # fmt: skip
Found = tuple[dict[str, tuple[int, ...]], dict[str, Any], nn.Module]
Made = Callable[..., Found]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """``made(model_type, **config)``: shapes on disk, config, and the model, without any weight being drawn."""

    def of(kind: str, **changes: Any) -> Found:
        config = AutoConfig.for_model(kind, **(SIZES | changes))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        return {name: tuple(p.shape) for name, p in model.state_dict().items()}, config.to_dict(), model

    return of


def found(shapes: dict[str, tuple[int, ...]], config: dict[str, Any]) -> set[str]:
    return {weight.name for weight in discover(shapes, shapes, config).weights}


@pytest.mark.parametrize("kind", ORDINARY)
def test_the_linears_of_ordinary_models(kind: str, made: Made) -> None:
    shapes, config, model = made(kind)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert found(shapes, config) == linears - {"lm_head"}
    assert len(linears) > 5


def test_matrices_stored_in_out_are_no_linears(made: Made) -> None:
    shapes, config, _ = made("gpt2", n_embd=64, n_layer=2, n_head=4)
    division = discover(shapes, shapes, config)
    assert not division.weights
    kept = {one.tensor: one.why for one in division.kept}
    assert kept["transformer.h.0.attn.c_proj.weight"] == "stored [in, out]: no linear"  # square: told by the others
    assert set(kept) == set(shapes)


def test_a_state_space_mixer_is_left_alone(made: Made) -> None:
    shapes, config, _ = made("mamba")
    assert not discover(shapes, shapes, config).weights


EXPERTS: dict[str, tuple[int, ...]] = {
    "model.layers.0.mlp.experts.gate_up_proj": (4, 64, 192),
    "model.layers.0.mlp.experts.down_proj": (4, 96, 64),
    "model.layers.0.mlp.experts.gate_up_proj_bias": (4, 192),
    "model.layers.0.mlp.router.weight": (4, 64),
    "model.layers.0.self_attn.q_proj.weight": (64, 64),
    "model.layers.0.self_attn.conv1d.weight": (64, 1, 4),
    "model.embed_tokens.weight": (128, 64),
    "lm_head.weight": (128, 64),
    "model.norm.weight": (64,),
}


def test_experts_in_one_tensor() -> None:
    division = discover(EXPERTS, EXPERTS, {"hidden_size": 64})
    assert {w.name: (w.slices, w.slice, w.transposed) for w in division.weights} == {
        "model.layers.0.mlp.experts.gate_up_proj": (4, (64, 192), True),
        "model.layers.0.mlp.experts.down_proj": (4, (96, 64), True),
        "model.layers.0.self_attn.q_proj": (1, (64, 64), False),
    }
    why = {one.tensor: one.why for one in division.kept}
    assert why["model.layers.0.mlp.router.weight"] == "router or gate of experts"
    assert why["model.embed_tokens.weight"] == "embedding" and why["lm_head.weight"] == "output layer"
    assert why["model.layers.0.mlp.experts.gate_up_proj_bias"] == UNNAMED


def test_what_is_empty_is_kept() -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "layers.0.experts.gate_up_proj": (0, 64, 64),
        "layers.0.experts.down_proj": (4, 64, 0),
        "layers.0.q.weight": (0, 64),
        "layers.0.k.weight": (64, 0),
    }
    division = discover(shapes, shapes, {"hidden_size": 64})
    assert not division.weights and {one.why for one in division.kept} == {EMPTY}


@pytest.mark.parametrize(("up", "down", "turned"), [
    ((4, 192, 64), (4, 64, 96), False), ((4, 64, 128), (4, 64, 64), True), ((4, 128, 64), (4, 64, 64), False),
    ((4, 64, 64), (4, 64, 64), False),
])  # fmt: skip
def test_how_experts_are_stored(up: tuple[int, ...], down: tuple[int, ...], turned: bool) -> None:
    """From the hidden size; a square matrix as the other beside it; [out, in] where nothing tells."""
    shapes = EXPERTS | {
        "model.layers.0.mlp.experts.gate_up_proj": up,
        "model.layers.0.mlp.experts.down_proj": down,
    }
    for config in ({"hidden_size": 64}, {"text_config": {"hidden_size": 64}}):
        assert [w.transposed for w in discover(shapes, shapes, config).weights if w.stacked] == [turned, turned]


def test_integers_and_small_matrices_are_kept() -> None:
    shapes = {"h.0.a.weight": (64, 64), "h.0.b.weight": (31, 64), "h.0.c.weight": (64, 64)}
    division = discover(shapes, ["h.0.a.weight", "h.0.b.weight"], {})
    assert [w.name for w in division.weights] == ["h.0.a"]
    assert {k.why for k in division.kept} == {"small: fewer than 32 features", "not floating point"}


def test_output_layer_and_embedding_by_name() -> None:
    assert head(EXPERTS) == "lm_head.weight" and embedding(EXPERTS) == "model.embed_tokens.weight"
    assert head(["h.0.output.weight", "gpt_neox.embed_in.weight"]) is None


def test_order_of_blocks() -> None:
    assert in_order(["m.10.a", "m.9.a", "z", "m.9.b"]) == ["z", "m.9.a", "m.9.b", "m.10.a"]


def test_a_real_folder(tiny: Checkpoints) -> None:
    from bitwright.checkpoint.reader import Checkpoint

    checkpoint = Checkpoint.open(tiny())
    shapes = {name: checkpoint.entry(name).shape for name in checkpoint.names}
    assert len(discover(shapes, shapes, checkpoint.config).weights) == 2 * 7
