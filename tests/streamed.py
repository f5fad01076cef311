"""The tiny model as methods and the stream see it: a skeleton, and calibration data in front of its first block."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.conftest import Checkpoints

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


def skeleton_of(folder: Path, dtype: torch.dtype = torch.float32) -> Skeleton:
    """The skeleton of a model folder, on the CPU; its blocks compute in ``dtype``."""
    source = Source.open(folder)
    family, config = source.described()
    return Skeleton(source.checkpoint, config, family, dtype, torch.device("cpu"))


@pytest.fixture(scope="module")
def streamed(tiny: Checkpoints) -> Streamed:
    """The tiny model in float32, and 8 segments of 32 random tokens in front of its first block."""
    skeleton = skeleton_of(tiny("float32"))
    tokens = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(5))
    return skeleton, enter(skeleton, tokens)


@pytest.fixture
def block(streamed: Streamed) -> Iterator[Block]:
    """The first block, for a test to change."""
    with streamed[0].block(0) as first:
        yield first


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
