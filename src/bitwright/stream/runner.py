"""One block in memory at a time: materialised, decided, quantized, run, handed on, freed.

The runner names no method and no format: it is handed callables.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from bitwright.core.block import Block
from bitwright.core.configuration import Configured
from bitwright.core.decisions import BlockDecisions
from bitwright.core.method import Closed, Context, Learned, WeightContext
from bitwright.core.progress import Listener, Progress
from bitwright.core.quantized import BlockReport, LinearReport, QuantizedBlock
from bitwright.core.scheme import Scheme
from bitwright.core.training import Training
from bitwright.steps.apply import Folded, fold, require_held, weights_of
from bitwright.steps.outliers import bounds_of
from bitwright.stream.activations import Stream, StreamErrors, advance, enter, replay
from bitwright.stream.block_data import StreamedBlock
from bitwright.stream.memory import keep_freed_memory, peak_memory
from bitwright.stream.skeleton import Skeleton
from bitwright.stream.train import Trainer, learnables_of


class Sink(Protocol):
    """Where finished blocks go, and where an interrupted run finds them again."""

    def finished(self, unit: str) -> bool:
        """Whether this unit was finished before."""

    def written(self, unit: str, block: Block) -> Mapping[str, Tensor]:
        """The parameters of a finished block, dequantized, by their names in the block."""

    def write(self, unit: str, result: QuantizedBlock) -> None:
        """Makes a unit durable."""


@dataclass(frozen=True)
class RunPlan:
    """What to do with every block.

    ``scales`` is the dtype that scales are stored in, and parameters that a transform moved. ``training`` and ``seed``
    are for learned methods. ``learned`` gives a block's parameters of an earlier training, which is then not repeated.
    ``arithmetic`` is the dtype that training multiplies in, None for the block's own.
    """

    scheme: Scheme
    methods: Sequence[Configured]
    scales: torch.dtype
    with_head: bool
    training: Training | None = None
    seed: int = 0
    learned: Callable[[str], Mapping[str, Tensor]] | None = None
    arithmetic: torch.dtype | None = None


def run(
    skeleton: Skeleton, plan: RunPlan, sink: Sink, *, tokens: Int[Tensor, "N T"] | None, listener: Listener
) -> None:
    """Quantizes every block that the sink has not finished, and the output layer where that is asked for.

    With calibration tokens both streams run along, and the reports carry output errors; without them no forward
    pass is made at all.
    """
    units = list(_units(skeleton, plan.with_head))
    keep_freed_memory()
    stream = None if tokens is None else enter(skeleton, tokens)
    for done, (unit, load) in enumerate(units):

        def inside(part: float = 0.0, detail: str = "", done: int = done, unit: str = unit) -> None:
            listener(Progress("quantize", done, len(units), unit, peak_memory(), part, detail))

        inside()
        if sink.finished(unit) and stream is None:
            continue
        with load() as block:
            if not sink.finished(unit):
                stream = _quantize(block, unit, skeleton, plan, sink, stream, inside)
            elif stream is not None and block.name:
                stream = replay(block, sink.written(unit, block), plan.scheme, stream, in_place=True)
    listener(Progress("quantize", len(units), len(units), "all blocks", peak_memory()))


def _units(skeleton: Skeleton, with_head: bool) -> Iterator[tuple[str, Callable[[], AbstractContextManager[Block]]]]:
    for index, name in enumerate(skeleton.block_names):
        yield name, partial(skeleton.block, index)
    if with_head:
        yield skeleton.family.head, skeleton.head


def _quantize(
    block: Block,
    unit: str,
    skeleton: Skeleton,
    plan: RunPlan,
    sink: Sink,
    stream: Stream | None,
    inside: Callable[[float, str], None],
) -> Stream | None:
    decisions, learned = _decide(block, plan, stream, inside)
    parameters = dict(block.module.named_parameters())
    folded = fold(parameters, block.topology, decisions, plan.scheme, plan.scales)
    for name, made in folded.linears.items():
        require_held(block.path(name), folded.full[f"{name}.weight"], made)
    after, errors = stream, None
    if stream is not None and block.name:  # the output layer's outputs would be logits of every calibration token
        after, errors = advance(block, folded, folded.written(), plan.scheme, stream, in_place=True)
    report = _report(block, unit, folded, decisions, errors)
    by_path = {block.path(name): q for name, q in folded.linears.items()}
    sink.write(unit, QuantizedBlock(by_path, _passed(skeleton, block, folded), report, learned))
    return after


def _decide(
    block: Block, plan: RunPlan, stream: Stream | None, inside: Callable[[float, str], None]
) -> tuple[BlockDecisions, dict[str, Tensor]]:
    """Run all methods in order, neighbouring learned ones together; return the decisions and what was learned.

    The output layer has no stream: learned methods are skipped there.
    """
    data = None if stream is None or not block.name else StreamedBlock(block, stream, plan.scheme, plan.scales)
    context = Context(plan.training or Training(), plan.scheme, plan.scales, plan.seed, data)
    decisions, learned = BlockDecisions(), dict[str, Tensor]()
    for trained, group in groupby(plan.methods, lambda each: isinstance(each.method, Learned)):
        methods = list(group)
        if not trained:
            for configured in methods:
                decisions = _decided(configured, block, context, decisions)
        elif data is not None:
            learnables = learnables_of(methods, block, context, decisions)
            objective = data.objective(context.settings)
            trainer = Trainer(block, learnables, context, decisions, objective, inside, plan.arithmetic)
            decisions = trainer.run() if plan.learned is None else trainer.adopt(plan.learned(block.name))
            learned |= trainer.learned
    return decisions, learned


def _decided(
    configured: Configured, block: Block, context: Context[Training], decisions: BlockDecisions
) -> BlockDecisions:
    """The decisions after one method that is not trained."""
    method = configured.method
    assert not isinstance(method, Learned)
    if isinstance(method, Closed):
        return method.decide(block, context.with_settings(configured.settings(context.scheme)), decisions)
    scheme, decided = context.scheme, {}
    settings, freedom = configured.settings(scheme), configured.freedom(scheme)
    for name, weight in weights_of(block, decisions).items():
        outliers = bounds_of(weight, scheme.tile, freedom.outliers)
        alone = WeightContext(settings, scheme, context.scale_dtype, freedom.tiles, outliers)
        decided[name] = method.decide(weight, alone, decisions.linear(name))
    return decisions.with_linears(decided)


def _passed(skeleton: Skeleton, block: Block, folded: Folded) -> dict[str, Tensor]:
    """The other tensors under the block's name: as the checkpoint stores them, or as the transform left them."""
    if not block.name:
        return {}
    quantized = {f"{block.path(name)}.weight" for name in block.topology.linears}
    names = [n for n in skeleton.checkpoint.names if n.startswith(f"{block.name}.") and n not in quantized]
    stored = {name: skeleton.checkpoint.read(name) for name in names}
    return stored | {block.path(name): tensor for name, tensor in folded.moved.items()}


def _report(
    block: Block, unit: str, folded: Folded, decisions: BlockDecisions, errors: StreamErrors | None
) -> BlockReport:
    rows = tuple(
        _linear_report(block, name, folded, errors.linears[name] if errors else None) for name in folded.linears
    )
    return BlockReport(unit, rows, errors.block if errors else None, decisions.fallbacks)


def _linear_report(block: Block, name: str, folded: Folded, output_error: float | None) -> LinearReport:
    weight, q = folded.full[f"{name}.weight"], folded.linears[name]
    error, size = q.dequantize().to(weight) - weight, float(torch.linalg.vector_norm(weight))
    return LinearReport(
        name=block.path(name),
        shape=q.shape,
        tile=q.tile.size(q.shape),
        bits_per_weight=q.bits_per_weight,
        storage_bits=q.storage_bits,
        weight_error=(float(torch.linalg.vector_norm(error)) / size) ** 2 if size else 0.0,
        output_error=output_error,
        outliers=0 if q.outlier_index is None else q.outlier_index.numel(),
        outlier_share=0.0 if q.outlier_index is None else q.outlier_index.numel() / weight.numel(),
    )
