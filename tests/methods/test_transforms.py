"""SmoothQuant, Outlier Suppression+ and AWQ: their formulas by hand, their objectives, and what is written."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import Checkpoints
from tests.methods.conftest import divergence
from tests.streamed import Streamed, context_of, outputs, read_by

import bitwright
from bitwright.core.block import Block
from bitwright.core.decisions import BlockDecisions
from bitwright.core.method import Closed
from bitwright.core.settings import Settings
from bitwright.methods import awq, osplus, smoothquant
from bitwright.methods.osplus import OSPlusSettings
from bitwright.methods.smoothquant import SmoothQuantSettings
from bitwright.steps.apply import fold, parameters_of
from bitwright.steps.trial import Trial
from bitwright.stream.activations import Activations

ALL = {"norm->qkv", "v->o", "norm->gate,up", "up->down"}


@pytest.fixture
def block(block: Block) -> Block:
    """The block with an outlier channel in front of q, k and v."""
    norm = block.module.get_submodule("input_layernorm")
    assert isinstance(norm.weight, torch.Tensor)
    with torch.no_grad():
        norm.weight[7] *= 50
    return block


def inputs_of(block: Block, inputs: Activations, linear: str) -> torch.Tensor:
    return read_by(block, [linear], inputs.reference)[linear]


def test_smoothquants_scale_is_the_papers(streamed: Streamed, block: Block) -> None:
    found = smoothquant.METHOD.decide(
        block, context_of(block, streamed[1], "W8A8", SmoothQuantSettings(alpha=0.7)), BlockDecisions()
    )
    assert set(found.sites) == {"norm->qkv", "norm->gate,up"}
    x = inputs_of(block, streamed[1], "self_attn.q_proj").abs().amax(0)
    w = torch.stack([block.weight(f"self_attn.{n}_proj").abs().amax(0) for n in "qkv"]).amax(0)
    torch.testing.assert_close(found.sites["norm->qkv"].scale, x**0.7 / w**0.3)
    everywhere = context_of(block, streamed[1], "W8A8", SmoothQuantSettings(sites="all"))
    assert set(smoothquant.METHOD.decide(block, everywhere, BlockDecisions()).sites) == ALL


def test_heads_that_share_a_value_head_share_the_largest_scale(streamed: Streamed, block: Block) -> None:
    """4 query heads of 16 channels over 2 value heads."""
    everywhere = context_of(block, streamed[1], "W8A8", SmoothQuantSettings(sites="all"))
    found = smoothquant.METHOD.decide(block, everywhere, BlockDecisions()).sites["v->o"].scale
    x = inputs_of(block, streamed[1], "self_attn.o_proj").abs().amax(0).view(2, 2, 16).amax(1).flatten()
    w = block.weight("self_attn.o_proj").abs().amax(0).view(2, 2, 16).amax(1).flatten()
    torch.testing.assert_close(found, (x / w).sqrt())


@pytest.mark.parametrize(
    "method", [smoothquant.METHOD, osplus.METHOD, awq.METHOD], ids=["smoothquant", "osplus", "awq"]
)
def test_the_full_precision_block_stays_what_it_was(method: Closed[Any], streamed: Streamed, block: Block) -> None:
    settings = method.settings(**({"sites": "all"} if "sites" in method.declared() else {}))
    context = context_of(block, streamed[1], "W4A4", settings)
    found = method.decide(block, context, BlockDecisions())
    assert any((site.scale - 1).abs().max() > 0.1 for site in found.sites.values())
    folded = fold(block.tensors, block.topology, found, context.allocation, torch.float32)
    after, before = (outputs(block, tensors, streamed[1].reference) for tensors in (folded.full, {}))
    assert (after - before).norm() < 1e-5 * before.norm()  # float32: single values near zero may be further off


def test_only_channels_past_the_threshold_are_scaled(streamed: Streamed, block: Block) -> None:
    """Outlier Suppression+: the outlier channel is scaled, most others are not, and the error falls."""
    context = context_of(block, streamed[1], "W4A4", OSPlusSettings())
    found = osplus.METHOD.decide(block, context, BlockDecisions())
    assert set(found.sites) == {"norm->qkv", "norm->gate,up"}
    scale = found.sites["norm->qkv"].scale
    assert scale.min() >= 1 and scale.argmax() == 7 and scale[7] > 4
    reach = inputs_of(block, streamed[1], "self_attn.q_proj").abs().amax(0)
    threshold = float(reach[7] / scale[7])
    torch.testing.assert_close(scale, (reach / threshold).clamp(min=1), rtol=1e-4, atol=1e-4)
    site = block.topology.sites[0]
    assert context.data is not None
    trial = Trial(block, site, context, context.data, BlockDecisions())
    assert trial.error(scale) < 0.7 * trial.error(torch.ones_like(scale))


def test_awqs_scale_is_the_best_power_of_the_mean_magnitudes(streamed: Streamed, block: Block) -> None:
    context = context_of(block, streamed[1], "W3A16g16", Settings())
    found = awq.METHOD.decide(block, context, BlockDecisions())
    assert set(found.sites) == ALL
    means = inputs_of(block, streamed[1], "self_attn.q_proj").abs().mean(0)
    candidates = [means ** (n / 20) for n in range(20)]
    candidates = [scale / (scale.max() * scale.min()).sqrt() for scale in candidates]
    assert context.data is not None
    trial = Trial(block, block.topology.sites[0], context, context.data, BlockDecisions())
    errors = [trial.error(scale) for scale in candidates]
    torch.testing.assert_close(found.sites["norm->qkv"].scale, candidates[errors.index(min(errors))])
    assert min(errors) < errors[0]


def test_awq_clips_all_but_what_attention_multiplies(streamed: Streamed, block: Block) -> None:
    context = context_of(block, streamed[1], "W3A16g16", Settings())
    found = awq.METHOD.decide(block, context, BlockDecisions())
    clipped = {name for name in block.topology.linears if found.linear(name).low is not None}
    assert clipped == set(block.topology.linears) - {"self_attn.q_proj", "self_attn.k_proj"}
    weight = parameters_of(block, found)["mlp.down_proj.weight"].view(64, 12, 16)
    low, high = found.linear("mlp.down_proj").low, found.linear("mlp.down_proj").high
    assert low is not None and high is not None
    largest = weight.abs().amax(2)
    shares = torch.maximum(-low, high) / largest
    assert shares.min() > 0.5 and (shares < 0.99).any() and shares.max() <= 1


@pytest.fixture(scope="module")
def recipe(tiny: Checkpoints, text: str) -> bitwright.Recipe:
    return bitwright.Recipe(model=str(tiny()), scheme="W3A16g16", calibration=text, samples=8, seqlen=64, method="rtn")


@pytest.mark.parametrize("method", ["awq", "awq+gptq", "smoothquant+gptq", "osplus+gptq", "smoothquant+lwc"])
def test_written_and_better_than_rounding(method: str, recipe: bitwright.Recipe, tmp_path: Path) -> None:
    assert divergence(replace(recipe, method=method), tmp_path / "found") < divergence(recipe, tmp_path / "rtn")
