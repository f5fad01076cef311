"""What is known of a Llama, and what is found in it: checked against the module that transformers builds."""

import json
from itertools import pairwise
from typing import Any

import pytest
import torch
from tests.conftest import HEAD_DIM, HIDDEN, Checkpoints, loaded
from tests.streamed import subject_of
from tests.tiny_models import linears_in
from transformers import AutoConfig, AutoModelForCausalLM

from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.block import Outline
from bitwright.core.decoder import Config, Decoder
from bitwright.core.registry import architecture_of
from bitwright.families import llama
from bitwright.model.plain_config import plain_decoder
from bitwright.model.view import ModelView


@pytest.mark.parametrize("tied", [False, True])
def test_the_places_are_there(tied: bool, tiny: Checkpoints) -> None:
    folder = tiny(tied=tied)
    family, subject = llama.family(AutoConfig.from_pretrained(folder).to_dict()), subject_of(folder)
    model = loaded(folder)
    assert [block.path for block in subject.anatomy.blocks] == ["model.layers.0", "model.layers.1"]
    assert subject.head is not None and model.get_submodule(subject.head.path) is model.get_output_embeddings()
    for anatomy in subject.anatomy.blocks:
        block = model.get_submodule(anatomy.path)
        assert type(block.get_submodule("self_attn")).__name__ == family.attention_class
        for group in anatomy.topology.groups:
            block.get_submodule(group.enclosing)
        assert sorted(anatomy.topology.linears) == sorted(linears_in(block))


def test_linears_of_a_group_read_the_same_input(tiny: Checkpoints) -> None:
    folder = tiny("float32")
    topology, model = subject_of(folder).anatomy.blocks[0].topology, loaded(folder)
    block, inputs = model.get_submodule("model.layers.0"), dict[str, torch.Tensor]()
    for name in topology.linears:
        block.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
    model(torch.arange(12)[None])
    for group in topology.groups:
        assert all(torch.equal(inputs[name], inputs[group.linears[0]]) for name in group.linears)
    firsts = [inputs[group.linears[0]] for group in topology.groups]
    assert not any(torch.equal(a, b) for a, b in pairwise(firsts) if a.shape == b.shape)
    assert list(inputs) == list(topology.linears), "in the order data flows through them"


def test_a_head_dim_that_is_not_written_is_hidden_size_over_heads(tiny: Checkpoints) -> None:
    config = AutoConfig.from_pretrained(tiny())
    config.head_dim = None
    assert llama.family(config.to_dict()).head_dim == HIDDEN // config.num_attention_heads == HEAD_DIM


CONFIGS: list[dict[str, Any]] = [
    {},
    {"tied": True},
    {"attention_bias": True, "mlp_bias": True},
    {"num_key_value_heads": None},
    {"head_dim": 32},
]


@pytest.mark.parametrize("how", CONFIGS, ids=str)
def test_the_outline_is_that_of_the_model(how: dict[str, Any], tiny: Checkpoints) -> None:
    folder = tiny(**how)
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    decoder = llama.decoder(config.to_dict())
    outline = Outline.of(decoder)
    assert outline.shapes == shapes and outline.tied == how.get("tied", False)
    checkpoint = Checkpoint.open(folder)
    assert ModelView.of_outline(outline, checkpoint) == ModelView.of_model(model, checkpoint.names)


STATED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "tie_word_embeddings"),
)
USUAL = {
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "rope_theta": 500000.0, "torch_dtype": "bfloat16", "eos_token_id": [128001, 128008],
}  # fmt: skip
"""As Llama 3.1's config.json has it."""


def plain(config: Config) -> Decoder | None:
    architecture = architecture_of("llama")
    assert architecture is not None
    return plain_decoder(config, architecture)


@pytest.mark.parametrize("how", [how for how in CONFIGS if "attention_bias" not in how], ids=str)
@pytest.mark.parametrize("more", [{}, USUAL], ids=["", "llama3"])
def test_a_usual_config_is_read_without_transformers(
    how: dict[str, Any], more: dict[str, Any], tiny: Checkpoints
) -> None:
    folder = tiny(**how)
    found = plain(json.loads((folder / "config.json").read_text()) | more)
    theirs = AutoConfig.from_pretrained(folder)
    assert found is not None and found.parameters == llama.decoder(theirs.to_dict()).parameters
    assert found.context == theirs.max_position_embeddings


@pytest.mark.parametrize("changes", [
    {"hidden_size": "64"}, {"hidden_size": 65}, {"num_attention_heads": 0}, {"num_key_value_heads": 3},
    {"num_hidden_layers": True}, {"hidden_act": "gelu"}, {"rope_parameters": 5},
    {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, {"rope_scaling": {"type": "linear", "factor": -1.0}},
    {"pad_token_id": 256}, {"dtype": "float99"}, {"text_config": {}}, {"rms_norm_eps": float("nan")},
    {"auto_map": {"AutoConfig": "mine.py"}}, {"architectures": ["LlamaForSequenceClassification"]},
])  # fmt: skip
def test_what_is_out_of_the_ordinary_is_for_transformers_to_judge(changes: dict[str, Any], tiny: Checkpoints) -> None:
    config = json.loads((tiny() / "config.json").read_text())
    assert plain(config) is not None and plain(config | changes) is None


@pytest.mark.parametrize("key", STATED)
def test_a_config_that_leaves_a_size_to_transformers(key: str, tiny: Checkpoints) -> None:
    config = json.loads((tiny() / "config.json").read_text())
    del config[key]
    assert plain(config) is None
