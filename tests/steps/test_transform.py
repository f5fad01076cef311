"""``apply_site`` on every site of Llama and OPT: random scales and shifts leave the block's output alone in float64."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.tiny_models import dissected
from torch import Tensor, nn
from torch.func import functional_call
from transformers import LlamaConfig, OPTConfig, PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.models.opt.modeling_opt import OPTDecoderLayer

from bitwright.core.block import Side, Site
from bitwright.steps.transform import apply_site

HIDDEN, TOKENS = 64, 9
Case = tuple[PretrainedConfig, nn.Module, dict[str, Any]]
"""A config, a block of it in float64, and what its forward pass takes beside the hidden states."""
SitesOf = Callable[[str], dict[str, Site]]
SIZES: dict[str, Any] = {
    "attn_implementation": "sdpa", "hidden_size": HIDDEN, "num_hidden_layers": 1, "vocab_size": 64,
    "max_position_embeddings": 32, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
LLAMA = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 96}
OPT = {"num_attention_heads": 2, "ffn_dim": 96, "dropout": 0.0, "word_embed_proj_dim": HIDDEN}


def randomized(block: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in block.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4
    return block.double().eval()


def llama_case(**changes: Any) -> Case:
    config = LlamaConfig(**(SIZES | LLAMA | changes))
    hidden, positions = torch.zeros(1, TOKENS, HIDDEN, dtype=torch.float64), torch.arange(TOKENS)[None]
    kwargs = {"position_embeddings": LlamaRotaryEmbedding(config)(hidden, positions), "position_ids": positions}
    return config, randomized(LlamaDecoderLayer(config, 0)), kwargs


def opt_case(**changes: Any) -> Case:
    config = OPTConfig(**(SIZES | OPT | changes))
    return config, randomized(OPTDecoderLayer(config, 0)), {}


CASES: dict[str, Callable[[], Case]] = {
    "llama": llama_case,
    "llama-biases": lambda: llama_case(attention_bias=True, mlp_bias=True),
    "llama-one-key-head": lambda: llama_case(num_key_value_heads=1),
    "opt": opt_case,
    "opt-no-bias": lambda: opt_case(enable_bias=False),
    "opt-gelu": lambda: opt_case(activation_function="gelu"),
}
NAMES = {
    "llama": ("norm->qkv", "q.k", "v->o", "norm->gate,up", "up->down"),
    "opt": ("norm->qkv", "q.k", "v->o", "norm->fc1", "fc1->fc2"),
}


def every_site() -> list[tuple[str, str]]:
    named = [(case, name) for case in CASES for name in NAMES[case.partition("-")[0]]]
    return [pair for pair in named if pair != ("opt-gelu", "fc1->fc2")]


@pytest.fixture(scope="module")
def sites_of(tmp_path_factory: pytest.TempPathFactory) -> SitesOf:
    """``sites_of("opt")``: the sites that are found in such a block."""
    known: dict[str, dict[str, Site]] = {}

    def found(case: str) -> dict[str, Site]:
        if case not in known:
            subject, _ = dissected(CASES[case]()[0], tmp_path_factory.mktemp(case))
            known[case] = {site.name: site for site in subject.anatomy.blocks[0].topology.sites}
        return known[case]

    return found


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
def test_a_site_leaves_the_output_alone(case: str, name: str, sites_of: SitesOf) -> None:
    _, block, kwargs = CASES[case]()
    site = sites_of(case)[name]
    parameters = {key: p.detach() for key, p in block.named_parameters()}
    moved = apply_site(parameters, site, *drawn(site))
    changed = {key for key in parameters if not torch.equal(parameters[key], moved[key])}
    assert {key.rpartition(".")[0] for key in changed} == {s.module for s in site.producers + site.consumers}
    torch.testing.assert_close(run(block, moved, kwargs), run(block, parameters, kwargs), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_all_sites_one_after_the_other(case: str, sites_of: SitesOf) -> None:
    _, block, kwargs = CASES[case]()
    parameters = {key: p.detach() for key, p in block.named_parameters()}
    moved = parameters
    assert [*sites_of(case)] == [name for of, name in every_site() if of == case]
    for site in sites_of(case).values():
        moved = apply_site(moved, site, *drawn(site))
    torch.testing.assert_close(run(block, moved, kwargs), run(block, parameters, kwargs), rtol=1e-8, atol=1e-8)


def test_opt_shifts_where_the_paper_does_and_scales_through_relu_alone(sites_of: SitesOf) -> None:
    sites = sites_of("opt")
    assert {name for name, site in sites.items() if site.shift} == {"norm->qkv", "v->o", "norm->fc1"}
    assert not sites["fc1->fc2"].paper and "fc1->fc2" not in sites_of("opt-gelu")


def test_a_shift_through_an_rmsnorm_is_refused(sites_of: SitesOf) -> None:
    site = sites_of("llama")["norm->qkv"]
    with pytest.raises(ValueError, match="cannot absorb a shift"):
        apply_site({}, site, torch.ones(site.channels), torch.ones(site.channels))


def test_a_norm_that_adds_one_to_its_weight() -> None:
    """Gemma's: 1 + w is what is divided; a channel without a parameter stays."""
    site = Site("", (Side("norm", offset=1.0),), (Side("linear", (1, -1, 0)),), 2)
    site = replace(site, producers=(replace(site.producers[0], index=(1, -1, 0)),))
    parameters = {"norm.weight": torch.tensor([0.0, 1.0, 3.0]), "linear.weight": torch.ones(1, 3)}
    moved = apply_site(parameters, site, torch.tensor([2.0, 4.0]))
    assert moved["norm.weight"].tolist() == [-0.75, 1.0, 1.0]
    assert moved["linear.weight"].tolist() == [[4.0, 1.0, 2.0]]
