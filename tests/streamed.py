"""The tiny model as methods and the stream see it, with calibration data in front of its first block."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from tests.conftest import Checkpoints
from torch import Tensor

from bitwright.core.block import Block
from bitwright.core.configuration import Configured
from bitwright.core.decisions import LinearDecision
from bitwright.core.method import Context, DataFree, WeightContext
from bitwright.core.scheme import Allocation, Scheme
from bitwright.core.settings import Settings
from bitwright.methods import compose
from bitwright.model.anatomy import dissect
from bitwright.model.config import text_config_of
from bitwright.model.skeleton import Skeleton
from bitwright.model.source import Source
from bitwright.steps.outliers import bounds_of
from bitwright.stream import memory
from bitwright.stream.activations import Activations, enter
from bitwright.stream.block_data import StreamedBlock
from bitwright.stream.forward import Inputs, outputs_of
from bitwright.stream.moments import _inputs
from bitwright.stream.subject import Subject

S = TypeVar("S", bound=Settings)
Streamed = tuple[Subject, Activations]


def subject_of(folder: Path, dtype: torch.dtype = torch.float32) -> Subject:
    """A model folder, its blocks known, on the CPU; its blocks compute in ``dtype``."""
    source = Source.open(folder, tokenizer=False)
    config = source.to_build()
    skeleton = Skeleton(source.checkpoint, config, dtype, torch.device("cpu"))
    return Subject.of(skeleton, dissect(skeleton, text_config_of(config).vocab_size))


def block_of(subject: Subject, index: int) -> AbstractContextManager[Block]:
    """A context with a block and its weights; the output layer has the number after the last block's."""
    head = () if subject.head is None else (subject.head,)
    return subject.loaded([*subject.anatomy.blocks, *head][index])


def outputs(block: Block, tensors: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
    """The hidden states that a block makes of all segments with some of its tensors replaced, [N, T, D]."""
    return torch.cat(list(outputs_of(block, tensors, inputs)))


def set_tokens_per_pass(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """Let segments of at most so many tokens run through a block at once."""
    monkeypatch.setattr(Inputs.batches, "__defaults__", (None, tokens))
    monkeypatch.setattr(memory, "TOKENS_PER_PASS", tokens)


def read_by(block: Block, linears: Sequence[str], inputs: Inputs) -> dict[str, Tensor]:
    """What linears of a block read, [N T, I]."""
    parts = [_inputs(block, linears, {}, inputs, rows) for rows in inputs.batches()]
    return {name: torch.cat([part[name] for part in parts if name in part]) for name in linears}


@pytest.fixture(scope="module")
def streamed(tiny: Checkpoints) -> Iterator[Streamed]:
    """The tiny model in float32, and 8 segments of 32 random tokens in front of its first block."""
    subject = subject_of(tiny("float32"))
    tokens = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(5))
    with enter(subject.skeleton, tokens) as stream:
        yield subject, stream.inputs()


@pytest.fixture
def block(streamed: Streamed) -> Iterator[Block]:
    """The first block, for a test to change."""
    with block_of(streamed[0], 0) as first:
        yield first


def context_of(block: Block, inputs: Activations, scheme: str, settings: S) -> Context[S]:
    """What a run shows to methods, scales in float32."""
    allocation = Allocation(Scheme.parse(scheme))
    data = StreamedBlock(block, inputs, allocation, torch.float32)
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
