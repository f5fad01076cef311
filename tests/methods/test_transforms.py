"""SmoothQuant, Outlier Suppression+ and AWQ: their formulas by hand, their objectives, and what is written."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.conftest import Checkpoints

import bitwright
from bitwright.api.source import Source
from bitwright.core.block import Block
from bitwright.core.decisions import BlockDecisions
from bitwright.core.method import Context, Moments
from bitwright.core.scheme import Scheme
from bitwright.core.settings import Settings
from bitwright.methods import awq, osplus, smoothquant
from bitwright.steps.apply import fold, parameters_of
from bitwright.steps.trial import Trial
from bitwright.stream.activations import Stream, enter, statistics
from bitwright.stream.forward import call_of, forward_all
from bitwright.stream.inspection import ModuleInspection
from bitwright.stream.moments import moments
from bitwright.stream.skeleton import Skeleton

TEXT = "".join(f"{n} green bottles hanging on the wall, and {n * n} red ones; " for n in range(120))
ALL = {"norm->qkv", "v->o", "norm->gate,up", "up->down"}


@pytest.fixture(scope="module")
def streamed(tiny: Checkpoints) -> tuple[Skeleton, Stream]:
    source = Source.open(tiny("float32"))
    skeleton = Skeleton(source.checkpoint, source.config, source.family, torch.float32, torch.device("cpu"))
    tokens = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(5))
    return skeleton, enter(skeleton, tokens)


@pytest.fixture
def block(streamed: tuple[Skeleton, Stream]) -> Iterator[Block]:
    """One block, with an outlier channel in front of q, k and v."""
    with streamed[0].block(0) as found:
        norm = found.module.get_submodule("input_layernorm")
        assert isinstance(norm.weight, torch.Tensor)
        with torch.no_grad():
            norm.weight[7] *= 50
        yield found


def context_of(block: Block, stream: Stream, scheme: str, settings: Settings) -> Context:
    parsed, kwargs = Scheme.parse(scheme), stream.kwargs_of(block)

    def inspect(module: str, decisions: BlockDecisions, tokens: int) -> ModuleInspection:
        full = parameters_of(block, decisions)
        return ModuleInspection(block, module, full, parsed, stream.activations.quantized, kwargs, tokens)

    def measure(linear: str, decisions: BlockDecisions) -> Moments:
        folded = fold(dict(block.module.named_parameters()), block.topology, decisions, parsed, torch.float32)
        return moments(block, linear, folded, parsed, stream.activations, kwargs, with_drift=False)

    stats, _ = statistics(block, stream)
    return Context(parsed, torch.float32, stream.activations, stats, settings, measure, inspect)


def inputs_of(block: Block, stream: Stream, linear: str) -> torch.Tensor:
    x, _ = call_of(block, linear, {}, stream.activations.reference, stream.kwargs_of(block))
    return x.flatten(0, 1)


def test_smoothquants_scale_is_the_papers(streamed: tuple[Skeleton, Stream], block: Block) -> None:
    found = smoothquant.METHOD.decide(
        block, context_of(block, streamed[1], "W8A8", Settings(alpha=0.7)), BlockDecisions()
    )
    assert set(found.sites) == {"norm->qkv", "norm->gate,up"}
    x = inputs_of(block, streamed[1], "self_attn.q_proj").abs().amax(0)
    w = torch.stack([block.weight(f"self_attn.{n}_proj").abs().amax(0) for n in "qkv"]).amax(0)
    torch.testing.assert_close(found.sites["norm->qkv"].scale, x**0.7 / w**0.3)
    everywhere = context_of(block, streamed[1], "W8A8", Settings(sites="all"))
    assert set(smoothquant.METHOD.decide(block, everywhere, BlockDecisions()).sites) == ALL


def test_heads_that_share_a_value_head_share_the_largest_scale(streamed: tuple[Skeleton, Stream], block: Block) -> None:
    """4 query heads of 16 channels over 2 value heads."""
    everywhere = context_of(block, streamed[1], "W8A8", Settings(sites="all"))
    found = smoothquant.METHOD.decide(block, everywhere, BlockDecisions()).sites["v->o"].scale
    x = inputs_of(block, streamed[1], "self_attn.o_proj").abs().amax(0).view(2, 2, 16).amax(1).flatten()
    w = block.weight("self_attn.o_proj").abs().amax(0).view(2, 2, 16).amax(1).flatten()
    torch.testing.assert_close(found, (x / w).sqrt())


@pytest.mark.parametrize("method", [smoothquant, osplus, awq])
def test_the_full_precision_block_stays_what_it_was(
    method: object, streamed: tuple[Skeleton, Stream], block: Block
) -> None:
    context = context_of(block, streamed[1], "W4A4", Settings(sites="all"))
    found = method.METHOD.decide(block, context, BlockDecisions())  # type: ignore[attr-defined]
    assert any((site.scale - 1).abs().max() > 0.1 for site in found.sites.values())
    folded = fold(dict(block.module.named_parameters()), block.topology, found, context.scheme, torch.float32)
    run = partial(forward_all, block, inputs=streamed[1].activations.reference, kwargs=streamed[1].kwargs_of(block))
    torch.testing.assert_close(run(parameters=folded.full), run(parameters={}), rtol=2e-4, atol=2e-4)


def test_only_channels_past_the_threshold_are_scaled(streamed: tuple[Skeleton, Stream], block: Block) -> None:
    """Outlier Suppression+: the outlier channel is scaled, most others are not, and the error falls."""
    context = context_of(block, streamed[1], "W4A4", Settings())
    found = osplus.METHOD.decide(block, context, BlockDecisions())
    assert set(found.sites) == {"norm->qkv", "norm->gate,up"}
    scale = found.sites["norm->qkv"].scale
    assert scale.min() >= 1 and scale.argmax() == 7 and scale[7] > 4
    reach = inputs_of(block, streamed[1], "self_attn.q_proj").abs().amax(0)
    threshold = float(reach[7] / scale[7])
    torch.testing.assert_close(scale, (reach / threshold).clamp(min=1), rtol=1e-4, atol=1e-4)
    site = block.topology.sites[0]
    trial = Trial(block, site, context, BlockDecisions(), osplus.TOKENS)
    assert trial.error(scale) < 0.7 * trial.error(torch.ones_like(scale))


def test_awqs_scale_is_the_best_power_of_the_mean_magnitudes(streamed: tuple[Skeleton, Stream], block: Block) -> None:
    context = context_of(block, streamed[1], "W3A16g16", Settings())
    found = awq.METHOD.decide(block, context, BlockDecisions())
    assert set(found.sites) == ALL
    means = inputs_of(block, streamed[1], "self_attn.q_proj").abs().mean(0)
    candidates = [means ** (n / 20) for n in range(20)]
    candidates = [scale / (scale.max() * scale.min()).sqrt() for scale in candidates]
    trial = Trial(block, block.topology.sites[0], context, BlockDecisions(), awq.TOKENS)
    errors = [trial.error(scale) for scale in candidates]
    torch.testing.assert_close(found.sites["norm->qkv"].scale, candidates[errors.index(min(errors))])
    assert min(errors) < errors[0]


def test_awq_clips_all_but_what_attention_multiplies(streamed: tuple[Skeleton, Stream], block: Block) -> None:
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
def recipe(tiny: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> bitwright.Recipe:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(TEXT)
    return bitwright.Recipe(
        model=str(tiny()), scheme="W3A16g16", calibration=str(text), samples=8, seqlen=64, method="rtn"
    )


@pytest.mark.parametrize("method", ["awq", "awq+gptq", "smoothquant+gptq", "osplus+gptq", "smoothquant+lwc"])
def test_written_and_better_than_rounding(method: str, recipe: bitwright.Recipe, tmp_path: Path) -> None:
    found = []
    for asked in (recipe, replace(recipe, method=method)):
        out = tmp_path / asked.settled_method
        bitwright.quantize(asked, out)
        measured = bitwright.evaluate(out, str(recipe.calibration), seqlen=64, reference=recipe.model).measurement
        assert measured is not None and measured.kl_divergence is not None
        found.append(measured.kl_divergence)
    assert found[1] < found[0]
