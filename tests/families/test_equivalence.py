"""The sites that are found in a Llama, by their documented meaning: scaled (and shifted) weights leave the block's
output alone.

The applier here is written from ``Site``'s documentation and used by nothing else: output channels of every producer
are divided by the scale (multiplied where it is reciprocal), input channels of every consumer multiplied; a shift is
taken off the producer's output and given back through the consumer's bias.
"""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import dissected
from torch import Tensor, nn
from transformers import LlamaConfig, OPTConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from bitwright.core.block import Side, Site

HIDDEN, HEADS, KV_HEADS, WIDTH, MLP, TOKENS = 64, 4, 2, 32, 96, 11
BIASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "attention_bias": {"attention_bias": True},
    "both": {"attention_bias": True, "mlp_bias": True},
}
SDPA: dict[str, Any] = {"attn_implementation": "sdpa"}
"""Eager attention takes the softmax in float32, whose rows sum to 1 only to seven digits."""
HEADS_OF = {"grouped": (4, 2), "one key head": (4, 1), "all of their own": (4, 4)}


def config_of(heads: int = HEADS, kv_heads: int = KV_HEADS, **changes: Any) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=WIDTH,
        num_hidden_layers=1,
        vocab_size=64,
        bos_token_id=None,
        eos_token_id=None,
        **(SDPA | changes),
    )


def random_block(config: LlamaConfig) -> LlamaDecoderLayer:
    block = LlamaDecoderLayer(config, layer_idx=0).double().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4)
    return block


@torch.no_grad()
def output(block: LlamaDecoderLayer, config: LlamaConfig) -> Tensor:
    hidden = torch.randn(2, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    positions = torch.arange(TOKENS)[None]
    rotary = LlamaRotaryEmbedding(config)(hidden, positions)
    mask = torch.full((TOKENS, TOKENS), float("-inf"), dtype=torch.float64).triu(1)[None, None]
    result = block(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
    assert isinstance(result, Tensor)
    return result


def per_channel(values: Tensor, side: Side) -> Tensor:
    return values if side.index is None else values[list(side.index)]


@torch.no_grad()
def apply(block: nn.Module, site: Site, scale: Tensor, shift: Tensor | None = None) -> None:
    for side in site.producers:
        module, s = block.get_submodule(side.module), per_channel(scale, side)
        s = 1 / s if side.reciprocal else s
        weight, bias = module.weight, getattr(module, "bias", None)
        assert isinstance(weight, Tensor)
        weight.copy_(weight / (s[:, None] if weight.dim() == 2 else s))
        if shift is not None:
            assert isinstance(bias, Tensor), f"{site.name}: {side.module} has nothing that absorbs a shift"
            bias.sub_(per_channel(shift, side))
        if isinstance(bias, Tensor):
            bias.div_(s)
    for side in site.consumers:
        module, s = block.get_submodule(side.module), per_channel(scale, side)
        assert isinstance(module, nn.Linear)
        if shift is not None:
            assert module.bias is not None, f"{site.name}: {side.module} has nothing that absorbs a shift"
            module.bias.add_(module.weight @ per_channel(shift, side))
        module.weight.mul_(s)


def scales(count: int, seed: int) -> Tensor:
    """Between 1/8 and 8, none of them one."""
    drawn = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.exp2(drawn * 6 - 3)


def documented(config: LlamaConfig) -> tuple[Site, ...]:
    """The sites of a Llama's block, as descriptions of architectures said them before they were discovered.

    Rotary positions mix channels c and c + head_dim/2 of a head, so they share a scale; the query heads of one key head
    share its scales.
    """
    assert config.num_key_value_heads is not None
    heads, kv_heads, half = config.num_attention_heads, config.num_key_value_heads, WIDTH // 2
    share = heads // kv_heads
    keys = tuple(h * half + c % half for h in range(kv_heads) for c in range(WIDTH))
    queries = tuple((h // share) * half + c % half for h in range(heads) for c in range(WIDTH))
    read = tuple((h // share) * WIDTH + c for h in range(heads) for c in range(WIDTH))
    q, k, v, o = (f"self_attn.{leaf}_proj" for leaf in "qkvo")
    gate, up, down = (f"mlp.{leaf}_proj" for leaf in ("gate", "up", "down"))
    return (
        Site("norm->qkv", (Side("input_layernorm"),), (Side(q), Side(k), Side(v)), HIDDEN),
        Site("q.k", (Side(q, queries), Side(k, keys, reciprocal=True)), (), kv_heads * half),
        Site("v->o", (Side(v),), (Side(o, read),), kv_heads * WIDTH, shift=bool(config.attention_bias)),
        Site("norm->gate,up", (Side("post_attention_layernorm"),), (Side(gate), Side(up)), HIDDEN),
        Site("up->down", (Side(up),), (Side(down),), MLP, paper=False),
    )


def variants() -> dict[str, LlamaConfig]:
    pairs = product(HEADS_OF.items(), BIASES.items())
    return {f"{name}, {biases}": config_of(*heads, **changes) for (name, heads), (biases, changes) in pairs}


CONFIGS = variants()
SITES = {f"{site.name}: {n}": (config, site) for n, config in CONFIGS.items() for site in documented(config)}
SHIFTED = {name: (config, site) for name, (config, site) in SITES.items() if site.shift}


def plainly(site: Site) -> Site:
    """The site with an index for every side, also where channels and parameters are one to one."""

    def full(sides: tuple[Side, ...]) -> tuple[Side, ...]:
        return tuple(replace(side, index=side.index or tuple(range(site.channels))) for side in sides)

    return replace(site, producers=full(site.producers), consumers=full(site.consumers))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_sites_that_are_found_are_those_that_were_described(name: str, tmp_path: Path) -> None:
    """Names, order, channels, ties, shifts, and which the paper has; and the linears that share an input."""
    config = CONFIGS[name]
    (block,) = dissected(config, tmp_path)[0].anatomy.blocks
    assert [plainly(site) for site in block.topology.sites] == [plainly(site) for site in documented(config)]
    q, k, v, o = (f"self_attn.{leaf}_proj" for leaf in "qkvo")
    assert [(group.linears, group.enclosing) for group in block.topology.groups] == [
        ((q, k, v), "self_attn"),
        ((o,), o),
        (("mlp.gate_proj", "mlp.up_proj"), "mlp"),
        (("mlp.down_proj",), "mlp.down_proj"),
    ]
    assert not block.kept and not block.layout.linears and block.joins


OPT: dict[str, tuple[dict[str, Any], dict[str, bool]]] = {
    "opt": ({}, {"norm->qkv": True, "q.k": False, "v->o": True, "norm->fc1": True, "fc1->fc2": False}),
    "no biases": (
        {"enable_bias": False},
        {"norm->qkv": False, "q.k": False, "v->o": False, "norm->fc1": False, "fc1->fc2": False},
    ),
    "gelu": (
        {"activation_function": "gelu"},
        {"norm->qkv": True, "q.k": False, "v->o": True, "norm->fc1": True},
    ),
}
"""Configs of OPT, and whether their sites absorb a shift; a ReLU lets a scale through, a GELU does not."""


@pytest.mark.parametrize("name", OPT)
def test_the_sites_of_opt(name: str, tmp_path: Path) -> None:
    changes, wanted = OPT[name]
    config = OPTConfig(
        hidden_size=HIDDEN, word_embed_proj_dim=HIDDEN, ffn_dim=MLP, num_attention_heads=2, num_hidden_layers=1,
        vocab_size=64, max_position_embeddings=32, **(SDPA | changes),
    )  # fmt: skip
    (block,) = dissected(config, tmp_path)[0].anatomy.blocks
    sites = {site.name: site for site in block.topology.sites}
    assert {name: site.shift for name, site in sites.items()} == wanted
    assert list(sites) == list(wanted)
    assert {name for name, site in sites.items() if not site.paper} == {"fc1->fc2"} & set(wanted)
    assert {site.channels for site in block.topology.sites} <= {HIDDEN, MLP}
    assert sites["norm->qkv"].producers == (Side("self_attn_layer_norm"),)
    assert sites["norm->fc1"].producers == (Side("final_layer_norm"),)
    query, key = sites["q.k"].producers
    assert (query.reciprocal, key.reciprocal) == (False, True) and query.index == key.index, "nothing is rotated"


@pytest.mark.parametrize(("config", "site"), SITES.values(), ids=SITES)
def test_a_scale_changes_nothing(config: LlamaConfig, site: Site) -> None:
    block = random_block(config)
    before = output(block, config)
    weights = {name: parameter.clone() for name, parameter in block.named_parameters()}
    apply(block, site, scales(site.channels, seed=5))
    for side in (*site.producers, *site.consumers):
        assert not torch.equal(block.get_parameter(f"{side.module}.weight"), weights[f"{side.module}.weight"])
    torch.testing.assert_close(output(block, config), before, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("config", "site"), SHIFTED.values(), ids=SHIFTED)
def test_a_shift_changes_nothing(config: LlamaConfig, site: Site) -> None:
    block = random_block(config)
    before = output(block, config)
    shift = torch.randn(site.channels, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    apply(block, site, scales(site.channels, seed=7), shift)
    torch.testing.assert_close(output(block, config), before, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", CONFIGS)
def test_all_sites_at_once(name: str) -> None:
    config = CONFIGS[name]
    block = random_block(config)
    before = output(block, config)
    for seed, site in enumerate(documented(config)):
        apply(block, site, scales(site.channels, seed))
    torch.testing.assert_close(output(block, config), before, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", CONFIGS)
def test_sites_fit_their_modules(name: str) -> None:
    """Every channel of every side has a parameter, every parameter a channel; a shift is promised only with biases."""
    config = CONFIGS[name]
    block = random_block(config)
    assert len({site.name for site in documented(config)}) == len(documented(config)) == 5
    for site in documented(config):
        for side in site.producers:
            index = side.index or tuple(range(site.channels))
            assert len(index) == block.get_parameter(f"{side.module}.weight").shape[0]
            assert set(index) == set(range(site.channels))
        for side in site.consumers:
            index = side.index or tuple(range(site.channels))
            assert len(index) == block.get_parameter(f"{side.module}.weight").shape[1]
            assert set(index) == set(range(site.channels))
    shifted = {site.name for site in documented(config) if site.shift}
    assert shifted == ({"v->o"} if config.attention_bias else set())


@pytest.mark.parametrize("name", CONFIGS)
def test_no_coarser_tie_is_asked_for_than_needed(name: str) -> None:
    """As many free parameters as the arithmetic allows: half a key head's channels under a rotary embedding for q.k, a
    value head's channels for v->o, and every channel elsewhere."""
    config = CONFIGS[name]
    free = {site.name: site.channels for site in documented(config)}
    assert config.num_key_value_heads is not None
    kv = config.num_key_value_heads * WIDTH
    assert free == {"norm->qkv": HIDDEN, "q.k": kv // 2, "v->o": kv, "norm->gate,up": HIDDEN, "up->down": MLP}


def untied(site: Site) -> Site:
    """The q.k site with a parameter for every channel of a key head: the two halves of a rotated pair come apart."""
    keys = tuple(range(KV_HEADS * WIDTH))
    queries = tuple((h * KV_HEADS // HEADS) * WIDTH + c for h in range(HEADS) for c in range(WIDTH))
    producers = (replace(site.producers[0], index=queries), replace(site.producers[1], index=keys))
    return replace(site, producers=producers, channels=KV_HEADS * WIDTH)


def without_groups(site: Site) -> Site:
    """The q.k site with the query heads of the second half reading the parameters of the first key head."""
    half = WIDTH // 2
    queries = tuple(c % half for _ in range(HEADS) for c in range(WIDTH))
    return replace(site, producers=(replace(site.producers[0], index=queries), site.producers[1]))


@pytest.mark.parametrize("broken", [untied, without_groups])
def test_breaking_a_tie_of_q_and_k_changes_the_output(broken: Any) -> None:
    config = CONFIGS["grouped, plain"]
    site = next(site for site in documented(config) if site.name == "q.k")
    block = random_block(config)
    before = output(block, config)
    apply(block, broken(site), scales(broken(site).channels, seed=5))
    assert (output(block, config) - before).abs().max() > 1e-3


def test_a_shift_where_it_does_not_belong_changes_the_output() -> None:
    """A shift taken off the keys is not given back by the output projection."""
    config = CONFIGS["grouped, both"]
    site = next(site for site in documented(config) if site.name == "v->o")
    wrong, ones = replace(site, producers=(Side("self_attn.k_proj"),)), torch.ones(site.channels, dtype=torch.float64)
    block = random_block(config)
    before = output(block, config)
    apply(block, wrong, ones, ones)
    assert (output(block, config) - before).abs().max() > 1e-3
