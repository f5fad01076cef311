"""``apply_site`` on every site of every family: random scales and shifts leave the block's output alone in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import LlamaConfig, OPTConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.models.opt.modeling_opt import OPTDecoderLayer

from bitwright.core.block import Family, Site
from bitwright.families import llama, opt
from bitwright.steps.transform import apply_site

HIDDEN, TOKENS = 32, 9
Case = tuple[Family, nn.Module, dict[str, Any]]
"""A family, a block of it in float64, and what its forward pass takes beside the hidden states."""
SDPA: dict[str, Any] = {"attn_implementation": "sdpa"}
LLAMA = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
OPT = {"num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": HIDDEN}


def randomized(block: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in block.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4
    return block.double().eval()


def llama_case(**changes: Any) -> Case:
    config = LlamaConfig(hidden_size=HIDDEN, vocab_size=8, **(SDPA | LLAMA | changes))
    hidden, positions = torch.zeros(1, TOKENS, HIDDEN, dtype=torch.float64), torch.arange(TOKENS)[None]
    kwargs = {"position_embeddings": LlamaRotaryEmbedding(config)(hidden, positions), "position_ids": positions}
    return llama.family(config.to_dict()), randomized(LlamaDecoderLayer(config, 0)), kwargs


def opt_case(**changes: Any) -> Case:
    config = OPTConfig(hidden_size=HIDDEN, vocab_size=8, dropout=0.0, **(SDPA | OPT | changes))
    return opt.family(config.to_dict()), randomized(OPTDecoderLayer(config, 0)), {}


CASES: dict[str, Callable[[], Case]] = {
    "llama": llama_case,
    "llama-biases": lambda: llama_case(attention_bias=True, mlp_bias=True),
    "llama-one-key-head": lambda: llama_case(num_key_value_heads=1),
    "opt": opt_case,
    "opt-no-bias": lambda: opt_case(enable_bias=False),
    "opt-gelu": lambda: opt_case(activation_function="gelu"),
}


def every_site() -> list[tuple[str, str]]:
    return [(case, site.name) for case, make in CASES.items() for site in make()[0].topology.sites]


@torch.no_grad()
def run(block: nn.Module, parameters: dict[str, Tensor], kwargs: dict[str, Any]) -> Tensor:
    hidden = torch.randn(2, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    mask = torch.full((TOKENS, TOKENS), float("-inf"), dtype=torch.float64).triu(1)[None, None]
    result: Tensor = functional_call(block, parameters, (hidden,), {"attention_mask": mask, **kwargs})
    return result


def drawn(site: Site) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(7)
    scale = torch.rand(site.channels, generator=generator, dtype=torch.float64) * 3 + 0.2
    shift = torch.randn(site.channels, generator=generator, dtype=torch.float64)
    return scale, shift if site.shift else None


@pytest.mark.parametrize(("case", "name"), every_site())
def test_a_site_leaves_the_output_alone(case: str, name: str) -> None:
    family, block, kwargs = CASES[case]()
    site = next(site for site in family.topology.sites if site.name == name)
    parameters = {key: p.detach() for key, p in block.named_parameters()}
    moved = apply_site(parameters, site, *drawn(site))
    changed = {key for key in parameters if not torch.equal(parameters[key], moved[key])}
    assert {key.rpartition(".")[0] for key in changed} == {s.module for s in site.producers + site.consumers}
    torch.testing.assert_close(run(block, moved, kwargs), run(block, parameters, kwargs), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_all_sites_one_after_the_other(case: str) -> None:
    family, block, kwargs = CASES[case]()
    parameters = {key: p.detach() for key, p in block.named_parameters()}
    moved = parameters
    for site in family.topology.sites:
        moved = apply_site(moved, site, *drawn(site))
    torch.testing.assert_close(run(block, moved, kwargs), run(block, parameters, kwargs), rtol=1e-8, atol=1e-8)


def test_opt_shifts_where_the_paper_does_and_scales_through_relu_alone() -> None:
    sites = {site.name: site for site in opt_case()[0].topology.sites}
    assert {name for name, site in sites.items() if site.shift} == {"norm->qkv", "v->o", "norm->fc1"}
    assert "fc1->fc2" in sites and not sites["fc1->fc2"].paper
    assert "fc1->fc2" not in {site.name for site in opt_case(activation_function="gelu")[0].topology.sites}


def test_a_shift_through_an_rmsnorm_is_refused() -> None:
    family, block, _ = llama_case()
    site = family.topology.sites[0]
    with pytest.raises(ValueError, match="cannot absorb a shift"):
        apply_site(dict(block.named_parameters()), site, torch.ones(site.channels), torch.ones(site.channels))
