"""Where things sit in a Llama: checked against the module that transformers builds."""

from itertools import pairwise

import pytest
import torch
from tests.conftest import HEAD_DIM, HIDDEN, KV_HEADS, Checkpoints
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from bitwright.families import llama


@pytest.mark.parametrize("tied", [False, True])
def test_the_places_are_there(tied: bool, tiny: Checkpoints) -> None:
    folder = tiny(tied=tied)
    family = llama.describe(AutoConfig.from_pretrained(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert family.model_type == model.config.model_type == "llama"
    assert isinstance(model.get_submodule(family.blocks), nn.ModuleList)
    assert model.get_submodule(family.embedding) is model.get_input_embeddings()
    assert model.get_submodule(family.head) is model.get_output_embeddings()
    assert type(model.get_submodule(family.final_norm)).__name__ == "LlamaRMSNorm"
    block = model.get_submodule(family.blocks)[0]
    assert type(block.self_attn).__name__ == family.attention_class
    for group in family.topology.groups:
        block.get_submodule(group.enclosing)
    linears = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    assert set(family.topology.linears) == linears
    assert len(family.topology.linears) == len(linears)


def test_linears_of_a_group_read_the_same_input(tiny: Checkpoints) -> None:
    folder = tiny("float32")
    family = llama.describe(AutoConfig.from_pretrained(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    block, inputs = model.get_submodule(family.blocks)[0], {}
    for name in family.topology.linears:
        block.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
    model(torch.arange(12)[None])
    for group in family.topology.groups:
        assert all(torch.equal(inputs[name], inputs[group.linears[0]]) for name in group.linears)
    firsts = [inputs[group.linears[0]] for group in family.topology.groups]
    assert not any(torch.equal(a, b) for a, b in pairwise(firsts) if a.shape == b.shape)
    assert list(inputs) == list(family.topology.linears), "in the order data flows through them"


def test_a_head_dim_that_is_not_written_is_hidden_size_over_heads(tiny: Checkpoints) -> None:
    config = AutoConfig.from_pretrained(tiny())
    config.head_dim = None
    sites = {site.name: site.channels for site in llama.describe(config).topology.sites}
    assert sites["v->o"] == KV_HEADS * HIDDEN // config.num_attention_heads == KV_HEADS * HEAD_DIM
