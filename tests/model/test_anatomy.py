"""The anatomy of models that nobody has described: their blocks, linears, groups, and what is kept, with the reason."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.streamed import block_of
from tests.tiny_models import Change, config_of, dissected
from transformers import PreTrainedModel

from bitwright.core.block import LinearGroup, Site
from bitwright.model.anatomy import BlockAnatomy
from bitwright.model.discover import ROUTER

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = SIZES | {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}  # fmt: skip
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
BY_ANOTHER_WAY = "read in another way than by a product"


def blocks_of(folder: Path, kind: str, sizes: dict[str, Any], change: Change = bool) -> tuple[BlockAnatomy, ...]:
    return dissected(config_of(kind, **sizes), folder, change)[0].anatomy.blocks


def groups_of(block: BlockAnatomy) -> list[tuple[tuple[str, ...], str]]:
    return [(group.linears, group.enclosing) for group in block.topology.groups]


def test_parallel_blocks_read_one_norm(tmp_path: Path) -> None:
    """Attention and MLP share an input; no module encloses all of its readers but the block itself."""
    block = blocks_of(tmp_path, "cohere", SIZES)[0]
    assert groups_of(block) == [
        ((*QKV, "mlp.gate_proj", "mlp.up_proj"), ""),
        (("self_attn.o_proj",), "self_attn.o_proj"),
        (("mlp.down_proj",), "mlp.down_proj"),
    ]


def test_blocks_may_differ(tmp_path: Path) -> None:
    """Latent attention; a dense MLP first, then experts beside one that all tokens go through."""
    dense, experts = blocks_of(tmp_path, "deepseek_v3", LATENT)
    latent = [
        (("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"), "self_attn"),
        (("self_attn.q_b_proj",), "self_attn.q_b_proj"),
        (("self_attn.kv_b_proj",), "self_attn.kv_b_proj"),
        (("self_attn.o_proj",), "self_attn.o_proj"),
    ]
    assert groups_of(dense) == [
        *latent,
        (("mlp.gate_proj", "mlp.up_proj"), "mlp"),
        (("mlp.down_proj",), "mlp.down_proj"),
    ]
    shared = "mlp.shared_experts"
    assert groups_of(experts) == [
        *latent,
        *(((f"mlp.experts.{n}.gate_proj", f"mlp.experts.{n}.up_proj"), "") for n in range(4)),
        *(((f"mlp.experts.{n}.down_proj",), f"mlp.experts.{n}.down_proj") for n in range(4)),
        ((f"{shared}.gate_proj", f"{shared}.up_proj"), shared),
        ((f"{shared}.down_proj",), f"{shared}.down_proj"),
    ]
    assert [group.routed for group in experts.topology.groups] == [False] * 4 + [True] * 8 + [False] * 2
    assert experts.kept == {"model.layers.1.mlp.gate.weight": ROUTER} and not dense.kept


def without_expert(number: int, kind: str) -> Change:
    """Let no token reach an expert."""

    def change(model: PreTrainedModel) -> None:
        for layer in model.get_submodule("model.layers").children():
            if kind == "gpt_oss":
                layer.get_parameter("mlp.router.bias")[number] = -1e4
            elif hasattr(layer.get_submodule("mlp"), "gate"):
                layer.get_buffer("mlp.gate.e_score_correction_bias")[number] = -1e4

    return change


@pytest.mark.parametrize("kind", ["gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("number", [0, 2])
def test_an_expert_that_no_token_reaches_is_as_the_others(kind: str, number: int, tmp_path: Path) -> None:
    """Stacked experts, and experts with tensors of their own: linears, groups, sites and places."""
    sizes = EXPERTS if kind == "gpt_oss" else LATENT
    all_reached = blocks_of(tmp_path / "all", kind, sizes)
    unreached = blocks_of(tmp_path / "but one", kind, sizes, without_expert(number, kind))
    for one, other in zip(unreached, all_reached, strict=True):
        assert sorted_sites(one) == sorted_sites(other)
        assert replace(one, topology=other.topology) == other and one.topology.groups == other.topology.groups


def sorted_sites(block: BlockAnatomy) -> list[Site]:
    """Sites with their consumers in the order of the names, not in that of the tokens that reached them."""
    sites = block.topology.sites
    return [replace(s, consumers=tuple(sorted(s.consumers, key=lambda side: side.module))) for s in sites]


def test_experts_stacked_in_one_tensor(tmp_path: Path) -> None:
    """Stored [E, I, O]: each is a linear, the tensor one weight; the two projections share nothing."""
    subject, model = dissected(config_of("gpt_oss", **EXPERTS), tmp_path)
    block = subject.anatomy.blocks[0]
    stacks = {weight.name: (weight.shape, weight.transposed) for weight in block.weights if weight.stacked}
    assert stacks == {
        "model.layers.0.mlp.experts.gate_up_proj": ((4, 64, 192), True),
        "model.layers.0.mlp.experts.down_proj": ((4, 96, 64), True),
    }
    assert [group.linears for group in block.topology.groups[2:]] == [
        *((f"mlp.experts.gate_up_proj.{n}",) for n in range(4)),
        *((f"mlp.experts.down_proj.{n}",) for n in range(4)),
    ]
    with block_of(subject, 0) as loaded:
        stored = model.get_parameter("model.layers.0.mlp.experts.down_proj")
        assert torch.equal(loaded.weight("mlp.experts.down_proj.3"), stored[3].T)
        tensors = loaded.tensors
        tensors["mlp.experts.down_proj.3.weight"] = torch.zeros(64, 96)
        changed = loaded.layout.parameters(tensors, loaded.parameters)["mlp.experts.down_proj"]
    assert torch.equal(changed[:3], stored[:3]) and not changed[3].any()


def test_weights_stored_in_out(tmp_path: Path) -> None:
    block = blocks_of(
        tmp_path, "gpt2", {"vocab_size": 128, "n_positions": 64, "n_embd": 64, "n_layer": 1, "n_head": 2}
    )[0]
    assert [(weight.name.removeprefix("transformer.h.0."), weight.transposed) for weight in block.weights] == [
        ("attn.c_attn", True), ("attn.c_proj", True), ("mlp.c_fc", True), ("mlp.c_proj", True),
    ]  # fmt: skip
    assert block.topology.groups[0] == LinearGroup(("attn.c_attn",), "attn.c_attn", "attn.c_attn.")


KEPT: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "a router": ("mixtral", EXPERTS, {"block_sparse_moe.gate.weight": ROUTER}),
    "a short convolution": (
        "mamba2",
        {"vocab_size": 128, "hidden_size": 64, "num_heads": 4, "head_dim": 32, "state_size": 16, "n_groups": 1,
         "chunk_size": 8, "num_hidden_layers": 1},
        {"mixer.conv1d.weight": BY_ANOTHER_WAY},
    ),
    "what a kernel reads": (
        "jamba",
        EXPERTS
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 16,
           "mamba_dt_rank": 32, "num_experts": 1},
        {"mamba.conv1d.weight": BY_ANOTHER_WAY, "mamba.A_log": BY_ANOTHER_WAY, "mamba.dt_proj.weight": BY_ANOTHER_WAY},
    ),
    "a tiny matrix": (
        "llama",
        SIZES | {"num_key_value_heads": 1, "head_dim": 16},
        {f"self_attn.{leaf}_proj.weight": "small: fewer than 32 features" for leaf in "kv"},
    ),
    "code for another setting": ("bloom", SIZES, {}),
    "code for this setting": (
        "bloom",
        SIZES | {"slow_but_exact": True, "pretraining_tp": 2},
        {"self_attention.dense.weight": BY_ANOTHER_WAY, "mlp.dense_4h_to_h.weight": BY_ANOTHER_WAY},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept_and_why(name: str, tmp_path: Path) -> None:
    """And everything else in a block that is a matrix is a linear."""
    kind, sizes, kept = KEPT[name]
    subject, model = dissected(config_of(kind, **sizes), tmp_path)
    block = subject.anatomy.blocks[0]
    assert block.kept == {f"{block.name}.{tensor}": why for tensor, why in kept.items()}
    checkpoint = subject.skeleton.checkpoint
    stored = [name for name in checkpoint.names if name.startswith(f"{block.name}.")]
    matrices = {name for name in stored if len(checkpoint.entry(name).shape) > 1}
    assert {weight.tensor for weight in block.weights} == matrices - block.kept.keys()
    assert block.weights and model.get_submodule(block.path) is not None


def test_a_layer_that_takes_the_keys_and_values_of_another(tmp_path: Path) -> None:
    """What it would make them of is in the checkpoint, and nothing reads it."""
    sizes = SIZES | {
        "head_dim": 32, "num_hidden_layers": 3, "num_kv_shared_layers": 1, "activation_sparsity_pattern": None,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"], "laurel_rank": 32,
        "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 32, "altup_num_inputs": 2,
    }  # fmt: skip
    *_, own, shared = blocks_of(tmp_path, "gemma3n_text", sizes)
    assert set(QKV) <= set(own.topology.linears)
    assert set(QKV) & set(shared.topology.linears) == {QKV[0]}
    unread = {name: why for name, why in shared.kept.items() if name.endswith(("k_proj.weight", "v_proj.weight"))}
    assert set(unread.values()) <= {"not read in a forward pass"}
