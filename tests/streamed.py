"""The tiny model as methods and the stream see it: a skeleton, and calibration data in front of its first block."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from tests.conftest import Checkpoints

from bitwright.core.block import Block
from bitwright.core.configuration import Configured
from bitwright.core.decisions import LinearDecision
from bitwright.core.method import Context, DataFree, WeightContext
from bitwright.core.scheme import Allocation, Scheme
from bitwright.core.settings import Settings
from bitwright.methods import compose
from bitwright.model.source import Source
from bitwright.steps.outliers import bounds_of
from bitwright.stream.activations import Stream, enter
from bitwright.stream.block_data import StreamedBlock
from bitwright.stream.skeleton import Skeleton

S = TypeVar("S", bound=Settings)
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


def context_of(block: Block, stream: Stream, scheme: str, settings: S) -> Context[S]:
    """What a run shows to methods, scales in float32."""
    allocation = Allocation(Scheme.parse(scheme))
    data = StreamedBlock(block, stream, allocation, torch.float32)
    return Context(settings, allocation, torch.float32, 0, data)


def configured(methods: str, preset: str = "bitwright", **asked: object) -> list[Configured]:
    """Methods with the settings of a preset, but for these."""
    return [Configured(name, method, preset, asked) for name, method in compose(methods).methods.items()]


def decided_alone(method: str, weight: torch.Tensor, scheme: str | Scheme, **asked: object) -> LinearDecision:
    """What a data-free method decides about a weight with scales in float32."""
    parsed = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    one = replace(configured(method)[0], asked=asked)
    assert isinstance(one.method, DataFree)
    freedom = one.freedom(parsed)
    outliers = bounds_of(weight, parsed.tile, freedom.outliers)
    context = WeightContext(one.settings(parsed), parsed, torch.float32, freedom.tiles, outliers)
    return one.method.decide(weight, context, LinearDecision())
