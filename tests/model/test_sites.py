"""Sites that are found in blocks of many kinds: what they are, and that scaling there changes no logits."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import config_of, dissected
from torch import Tensor, nn

from bitwright.core.block import Side, Site
from bitwright.model.anatomy import BlockAnatomy
from bitwright.steps.transform import apply_site

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
LATENT = SIZES | {
    "num_key_value_heads": 2, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32,
    "v_head_dim": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "moe_intermediate_size": 32, "first_k_dense_replace": 1,
}  # fmt: skip
EXPERTS = SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}
KINDS: dict[str, dict[str, Any]] = {
    "llama": SIZES, "gemma": SIZES, "gemma2": SIZES, "qwen3": SIZES, "phi3": SIZES, "gpt_neox": SIZES,
    "cohere": SIZES, "deepseek_v3": LATENT, "mixtral": EXPERTS, "gpt_oss": EXPERTS,
    "gpt2": {"vocab_size": 128, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 2},
    "bloom": SIZES | {"num_key_value_heads": 2},
    "mamba2": {
        "vocab_size": 128, "hidden_size": 64, "num_heads": 4, "head_dim": 32, "state_size": 16, "n_groups": 1,
        "chunk_size": 8, "num_hidden_layers": 2,
    },
}  # fmt: skip
TOKENS = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(1))


def first_block(folder: Path, kind: str, **changes: Any) -> dict[str, Site]:
    block = dissected(config_of(kind, **(KINDS[kind] | changes)), folder)[0].anatomy.blocks[0]
    return {site.name: site for site in block.topology.sites}


@torch.no_grad()
def scale_all_sites(module: nn.Module, block: BlockAnatomy) -> None:
    """Scale (and shift) at every site of a block; the block computes in float64."""
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    tensors: Mapping[str, Tensor] = block.layout.tensors(parameters)
    for seed, site in enumerate(block.topology.sites):
        generator = torch.Generator().manual_seed(seed)
        scale = torch.exp2(torch.rand(site.channels, generator=generator, dtype=torch.float64) * 4 - 2)
        shift = torch.randn(site.channels, generator=generator, dtype=torch.float64) if site.shift else None
        tensors = apply_site(tensors, site, scale, shift)
    for name, changed in block.layout.parameters(tensors, parameters).items():
        module.get_parameter(name).copy_(changed)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_all_sites_of_all_blocks_leave_the_logits_alone(kind: str, tmp_path: Path) -> None:
    subject, model = dissected(config_of(kind, **KINDS[kind]), tmp_path)
    double = model.double()
    double.set_experts_implementation("eager")
    before = double(TOKENS).logits
    for block in subject.anatomy.blocks:
        assert block.topology.sites
        own = {name: parameter.clone() for name, parameter in double.get_submodule(block.path).named_parameters()}
        scale_all_sites(double.get_submodule(block.path), block)
        changed = {n for n, p in double.get_submodule(block.path).named_parameters() if not torch.equal(p, own[n])}
        assert len(changed) >= 2
    off = (double(TOKENS).logits - before).abs().max()
    assert float(off) < 1e-4 * float(before.abs().max())


def test_norms_that_add_one_to_their_weights(tmp_path: Path) -> None:
    """Gemma's norms multiply by 1 + w; behind attention and the MLP, Gemma 2 has norms that nothing but a sum reads."""
    for kind, mlp_norm in (("gemma", "post_attention_layernorm"), ("gemma2", "pre_feedforward_layernorm")):
        sites = first_block(tmp_path / kind, kind)
        assert list(sites) == ["norm->qkv", "q.k", "v->o", "norm->gate,up", "up->down"]
        assert sites["norm->qkv"].producers == (Side("input_layernorm", offset=1.0),)
        assert sites["norm->gate,up"].producers == (Side(mlp_norm, offset=1.0),)


def test_queries_and_keys_with_norms_of_their_own(tmp_path: Path) -> None:
    """Their scales go into the norms: one norm for all heads, whose halves share a scale under a rotary embedding."""
    site = first_block(tmp_path, "qwen3")["q.k"]
    halves = tuple(channel % 16 for channel in range(32))
    assert site.producers == (
        Side("self_attn.q_norm", halves),
        Side("self_attn.k_norm", halves, reciprocal=True),
    )
    assert site.channels == 16


def test_queries_keys_and_values_in_one_linear(tmp_path: Path) -> None:
    """And gates with what they multiply: the rows of values, and of what is gated, are told from the others."""
    sites = first_block(tmp_path, "phi3")
    assert list(sites) == ["norm->qkv", "qkv->o", "norm->gate_up", "gate_up->down"]
    values, gated = sites["qkv->o"], sites["gate_up->down"]
    assert values.producers == (Side("self_attn.qkv_proj", (*[-1] * 96, *range(32))),)
    assert values.consumers == (Side("self_attn.o_proj", (*range(32), *range(32))),), "both heads read one"
    assert gated.producers == (Side("mlp.gate_up_proj", (*[-1] * 96, *range(96))),)
    assert gated.consumers == (Side("mlp.down_proj"),)
    assert (values.channels, gated.channels) == (32, 96)


@pytest.mark.parametrize("kind", ["gpt_neox", "bloom"])
def test_queries_keys_and_values_head_by_head(kind: str, tmp_path: Path) -> None:
    """Rows of a head follow each other: its queries, its keys, its values."""
    (site,) = (site for name, site in first_block(tmp_path, kind).items() if name == "query_key_value->dense")
    assert site.producers[0].index == (*[-1] * 64, *range(32), *[-1] * 64, *range(32, 64))
    assert site.consumers[0].index is None
    assert site.shift and site.channels == 64, "rows of attention sum to one, and both ends have biases"


def test_latent_attention(tmp_path: Path) -> None:
    """Norms between low-rank pairs; values beside the keys that they are made with."""
    sites = first_block(tmp_path, "deepseek_v3")
    assert list(sites) == [
        *("norm->q_a,kv_a_proj_with_mqa", "norm->q_b", "norm->kv_b", "kv_b->o", "norm->gate,up", "up->down"),
    ]
    assert sites["norm->q_b"].producers == (Side("self_attn.q_a_layernorm"),)
    assert sites["norm->kv_b"].producers == (Side("self_attn.kv_a_layernorm"),)
    (values,) = sites["kv_b->o"].producers
    assert values.index == (*[-1] * 32, *range(32), *[-1] * 32, *range(32, 64))


def test_experts(tmp_path: Path) -> None:
    """One norm for all of them and their router, which stays in full precision; a site inside of each."""
    sites = first_block(tmp_path, "mixtral")
    block = "block_sparse_moe"
    norm = sites["norm->w1,w3"]
    assert {side.module for side in norm.consumers} == {
        f"{block}.experts.{n}.{leaf}" for n in range(4) for leaf in ("w1", "w3")
    }
    assert [side.module for side in norm.in_full] == [f"{block}.gate"]
    for n in range(4):
        site = sites[f"{block}.experts.{n}.w3->w2"]
        assert site.producers == (Side(f"{block}.experts.{n}.w3"),) and not site.paper
        assert site.consumers == (Side(f"{block}.experts.{n}.w2"),)


def test_a_norm_with_two_readers_in_parallel(tmp_path: Path) -> None:
    (site,) = (site for name, site in first_block(tmp_path, "cohere").items() if name.startswith("norm"))
    attention = [f"self_attn.{leaf}_proj" for leaf in "qkv"]
    assert [side.module for side in site.consumers] == [*attention, "mlp.gate_proj", "mlp.up_proj"]


NONE_BEHIND_NORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "norms at the end": (
        "opt",
        SIZES
        | {"do_layer_norm_before": False, "ffn_dim": 96, "word_embed_proj_dim": 64, "head_dim": None,
           "num_key_value_heads": None},
    ),
    "the residual is what the norm makes": ("bloom", {"apply_residual_connection_post_layernorm": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", NONE_BEHIND_NORMS)
def test_where_a_residual_reads_the_norm_too_there_is_no_site(name: str, tmp_path: Path) -> None:
    kind, changes = NONE_BEHIND_NORMS[name]
    sizes = {key: value for key, value in (KINDS.get(kind, {}) | changes).items() if value is not None}
    subject, _ = dissected(config_of(kind, **sizes), tmp_path)
    for block in subject.anatomy.blocks:
        producers = {side.module for site in block.topology.sites for side in site.producers}
        assert producers and not any("norm" in producer for producer in producers)


def test_what_lies_between_must_let_a_scale_through(tmp_path: Path) -> None:
    """A ReLU does, a GELU does not."""
    assert not any("4h_to_h" in name.partition("->")[2] for name in first_block(tmp_path / "gelu", "gpt_neox"))
    relu = first_block(tmp_path / "relu", "gpt_neox", hidden_act="relu")
    (site,) = (site for name, site in relu.items() if name == "dense_h_to_4h->dense_4h_to_h")
    assert site.channels == 96 and not site.shift
