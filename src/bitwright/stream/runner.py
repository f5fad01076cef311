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
from bitwright.core.decisions import BlockDecisions
from bitwright.core.method import Closed, Context, DataFree, Learned, Method, Moments
from bitwright.core.progress import Listener, Progress
from bitwright.core.quantized import BlockReport, LinearReport, QuantizedBlock
from bitwright.core.scheme import Scheme
from bitwright.core.settings import Settings
from bitwright.steps.apply import Folded, fold, parameters_of, require_held, weights_of
from bitwright.stream.activations import Stream, StreamErrors, advance, enter, replay, statistics
from bitwright.stream.forward import forward_all
from bitwright.stream.inspection import ModuleInspection
from bitwright.stream.memory import keep_freed_memory, peak_memory
from bitwright.stream.moments import moments
from bitwright.stream.skeleton import Skeleton
from bitwright.stream.train import Objective, Trainer, learnables_of


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
    """What to do with every block. ``scales`` is the dtype that scales are stored in, and parameters that a transform
    moved. ``learned`` gives a block's parameters of an earlier training: none is done now. ``arithmetic`` is what a
    training multiplies in, the block's own dtype where nothing is said."""

    scheme: Scheme
    methods: Sequence[Method]
    settings: Settings
    scales: torch.dtype
    with_head: bool
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
    """All methods in order, neighbouring learned ones trained together; and what they learned.

    On the output layer, which has no stream of its own, what is learned elsewhere has its default.
    """
    context, targets = _context(block, plan, stream)
    decisions = BlockDecisions()
    learned: dict[str, Tensor] = {}
    for is_learned, methods in groupby(plan.methods, lambda method: isinstance(method, Learned)):
        if not is_learned:
            for method in methods:
                decisions = _decided(method, block, context, decisions)
        elif stream is not None and targets is not None:
            learnables = learnables_of([m for m in methods if isinstance(m, Learned)], block, context, decisions)
            objective = _objective(block, plan, stream, targets)
            trainer = Trainer(block, learnables, context, decisions, objective, inside, plan.arithmetic)
            decisions = trainer.run() if plan.learned is None else trainer.adopt(plan.learned(block.name))
            learned |= trainer.learned
    return decisions, learned


def _decided(method: Method, block: Block, context: Context, decisions: BlockDecisions) -> BlockDecisions:
    if isinstance(method, Closed):
        return method.decide(block, context, decisions)
    assert isinstance(method, DataFree)
    weights = weights_of(block, decisions)
    return decisions.with_linears({n: method.decide(w, context, decisions.linear(n)) for n, w in weights.items()})


def _context(block: Block, plan: RunPlan, stream: Stream | None) -> tuple[Context, Tensor | None]:
    """What methods see, and the block's full-precision outputs; no data for the output layer, and without text."""
    if stream is None or not block.name:
        return Context(plan.scheme, plan.scales, settings=plan.settings), None
    reads = any(isinstance(m, Learned) or (isinstance(m, Closed) and m.reads_stats) for m in plan.methods)
    stats, targets = statistics(block, stream) if reads else ({}, None)
    measure, inspect = partial(_moments, block, plan, stream), partial(_inspect, block, plan, stream)
    return Context(plan.scheme, plan.scales, stream.activations, stats, plan.settings, measure, inspect), targets


def _inspect(
    block: Block, plan: RunPlan, stream: Stream, module: str, decisions: BlockDecisions, tokens: int
) -> ModuleInspection:
    parameters, inputs = parameters_of(block, decisions), stream.activations.quantized
    return ModuleInspection(block, module, parameters, plan.scheme, inputs, stream.kwargs_of(block), tokens)


def _moments(block: Block, plan: RunPlan, stream: Stream, linear: str, decisions: BlockDecisions) -> Moments:
    folded = fold(dict(block.module.named_parameters()), block.topology, decisions, plan.scheme, plan.scales)
    inputs, kwargs = stream.activations, stream.kwargs_of(block)
    return moments(block, linear, folded, plan.scheme, inputs, kwargs, with_drift=plan.settings.drift)


def _objective(block: Block, plan: RunPlan, stream: Stream, targets: Tensor) -> Objective:
    kwargs = stream.kwargs_of(block)
    also = forward_all(block, {}, stream.activations.quantized, kwargs) if plan.settings.aug_loss else None
    return Objective(stream.activations, targets, also, kwargs)


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
