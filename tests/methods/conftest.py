"""What the tests of methods share: a block with the data that methods see, and what a written folder has lost."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.conftest import Checkpoints

import bitwright
from bitwright.core.block import Block
from bitwright.core.decisions import BlockDecisions
from bitwright.core.method import Context, Moments
from bitwright.core.scheme import Scheme
from bitwright.core.settings import Settings
from bitwright.model.source import Source
from bitwright.steps.apply import fold, parameters_of
from bitwright.stream.activations import Stream, enter, statistics
from bitwright.stream.inspection import ModuleInspection
from bitwright.stream.moments import moments
from bitwright.stream.skeleton import Skeleton

Streamed = tuple[Skeleton, Stream]


@pytest.fixture(scope="module")
def streamed(tiny: Checkpoints) -> Streamed:
    """The tiny model in float32, and 8 segments of 32 random tokens in front of its first block."""
    source = Source.open(tiny("float32"))
    skeleton = Skeleton(source.checkpoint, source.config, source.family, torch.float32, torch.device("cpu"))
    tokens = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(5))
    return skeleton, enter(skeleton, tokens)


@pytest.fixture
def block(streamed: Streamed) -> Iterator[Block]:
    """The first block, for a test to change."""
    with streamed[0].block(0) as found:
        yield found


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a text to learn from and to measure on."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{n} green bottles hanging on the wall, and {n * n} red ones; " for n in range(120)))
    return str(path)


def context_of(block: Block, stream: Stream, scheme: str, settings: Settings) -> Context:
    """What a run shows to methods, scales in float32; moments are without drift."""
    parsed = Scheme.parse(scheme)
    measure, inspect = partial(_moments, block, stream, parsed), partial(_inspect, block, stream, parsed)
    stats, _ = statistics(block, stream)
    return Context(parsed, torch.float32, stream.activations, stats, settings, measure, inspect)


def _moments(block: Block, stream: Stream, scheme: Scheme, linear: str, decisions: BlockDecisions) -> Moments:
    folded = fold(dict(block.module.named_parameters()), block.topology, decisions, scheme, torch.float32)
    return moments(block, linear, folded, scheme, stream.activations, stream.kwargs_of(block), with_drift=False)


def _inspect(
    block: Block, stream: Stream, scheme: Scheme, module: str, decisions: BlockDecisions, tokens: int
) -> ModuleInspection:
    inputs, kwargs = stream.activations.quantized, stream.kwargs_of(block)
    return ModuleInspection(block, module, parameters_of(block, decisions), scheme, inputs, kwargs, tokens)


def divergence(recipe: bitwright.Recipe, out: Path) -> float:
    """Runs a recipe; the KL divergence of the written folder from the original, on the text it learned from."""
    bitwright.quantize(recipe, out)
    found = bitwright.evaluate(out, recipe.calibration, seqlen=recipe.seqlen, reference=recipe.model).measurement
    assert found is not None and found.kl_divergence is not None
    return found.kl_divergence
