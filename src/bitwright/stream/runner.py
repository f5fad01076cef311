"""One block in memory at a time: materialised, decided, quantized, run, handed on, freed.

The runner names no method and no format: it is handed callables.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from bitwright.core.block import Block
from bitwright.core.decisions import BlockDecisions
from bitwright.core.method import Context, Method
from bitwright.core.progress import Listener, Progress
from bitwright.core.qtensor import QTensor
from bitwright.core.quantized import BlockReport, LinearReport, QuantizedBlock
from bitwright.core.scheme import Scheme
from bitwright.steps.apply import quantize_linear
from bitwright.stream.activations import Stream, StreamErrors, advance, enter
from bitwright.stream.budget import peak_memory
from bitwright.stream.skeleton import Skeleton


class Sink(Protocol):
    """Where finished blocks go, and where an interrupted run finds them again."""

    def finished(self, unit: str) -> bool:
        """Whether this unit was finished before."""

    def weights(self, unit: str, block: Block) -> Mapping[str, Tensor]:
        """The dequantized weights of a finished unit, by the linears' names in the block."""

    def write(self, unit: str, result: QuantizedBlock) -> None:
        """Makes a unit durable."""


def run(
    skeleton: Skeleton,
    scheme: Scheme,
    methods: Sequence[Method],
    sink: Sink,
    *,
    tokens: Int[Tensor, "N T"] | None,
    with_head: bool,
    listener: Listener,
) -> None:
    """Quantizes every block that the sink has not finished, and the output layer where that is asked for.

    With calibration tokens both streams run along, and the reports carry output errors; without them no forward
    pass is made at all.
    """
    units = list(_units(skeleton, with_head))
    stream = None if tokens is None else enter(skeleton, tokens)
    for done, (unit, load) in enumerate(units):
        listener(Progress("quantize", done, len(units), unit, peak_memory()))
        if sink.finished(unit) and stream is None:
            continue
        with load() as block:
            if sink.finished(unit):
                stream = _replay(block, sink.weights(unit, block), stream)
            else:
                stream = _quantize(block, skeleton, scheme, methods, stream, sink, unit)
    listener(Progress("quantize", len(units), len(units), "all blocks", peak_memory()))


def _units(skeleton: Skeleton, with_head: bool) -> Iterator[tuple[str, Callable[[], AbstractContextManager[Block]]]]:
    for index, name in enumerate(skeleton.block_names):
        yield name, partial(skeleton.block, index)
    if with_head:
        yield skeleton.family.head, skeleton.head


def _replay(block: Block, weights: Mapping[str, Tensor], stream: Stream | None) -> Stream | None:
    return None if stream is None else advance(block, weights, stream)[0]


def _quantize(
    block: Block,
    skeleton: Skeleton,
    scheme: Scheme,
    methods: Sequence[Method],
    stream: Stream | None,
    sink: Sink,
    unit: str,
) -> Stream | None:
    dtype = skeleton.checkpoint.dtype_of_weights
    context = Context(scheme, dtype, stream.activations if stream else None)
    decisions = BlockDecisions()
    for method in methods:
        decisions = method.decide(block, context, decisions)
    linears = {
        name: quantize_linear(block.weight(name), decisions.linear(name), scheme, dtype)
        for name in block.topology.linears
    }
    after, errors = stream, None
    if stream is not None:
        after, errors = advance(block, {name: q.dequantize() for name, q in linears.items()}, stream)
    report = _report(block, unit, linears, decisions, errors)
    by_path = {block.path(name): q for name, q in linears.items()}
    sink.write(unit, QuantizedBlock(by_path, _passed(skeleton, block), report))
    return after


def _passed(skeleton: Skeleton, block: Block) -> dict[str, Tensor]:
    """The other tensors under the block's name, as the checkpoint stores them."""
    if not block.name:
        return {}
    quantized = {f"{block.path(name)}.weight" for name in block.topology.linears}
    names = [n for n in skeleton.checkpoint.names if n.startswith(f"{block.name}.") and n not in quantized]
    return {name: skeleton.checkpoint.read(name) for name in names}


def _report(
    block: Block, unit: str, linears: Mapping[str, QTensor], decisions: BlockDecisions, errors: StreamErrors | None
) -> BlockReport:
    rows = tuple(
        _linear_report(block, name, q, errors.linears[name] if errors else None) for name, q in linears.items()
    )
    return BlockReport(unit, rows, errors.block if errors else None, decisions.fallbacks)


def _linear_report(block: Block, name: str, q: QTensor, output_error: float | None) -> LinearReport:
    weight = block.weight(name).float()
    error = torch.linalg.vector_norm(q.dequantize().to(weight) - weight) / torch.linalg.vector_norm(weight)
    return LinearReport(
        name=block.path(name),
        shape=q.shape,
        tile=q.tile.size(q.shape),
        bits_per_weight=q.bits_per_weight,
        storage_bits=q.storage_bits,
        weight_error=float(error.nan_to_num(0.0)) ** 2,
        output_error=output_error,
    )
