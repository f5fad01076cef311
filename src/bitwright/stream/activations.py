"""The two streams of activations: through the full-precision blocks, and through the quantized ones."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from bitwright.core.block import Block
from bitwright.core.method import LinearStats
from bitwright.core.scheme import Scheme
from bitwright.model.calls import hand_back, hidden_of, mapped, split
from bitwright.model.skeleton import Skeleton
from bitwright.model.walk import Walk
from bitwright.steps.activations import quantized_activations
from bitwright.steps.apply import Folded
from bitwright.stream.forward import Inputs, outputs_of, placed, run


@dataclass(frozen=True)
class Activations:
    """A block's inputs on the full-precision stream and on the quantized stream."""

    reference: Inputs
    quantized: Inputs


@dataclass(frozen=True)
class Stream:
    """Calibration data on their way through the model, in front of one block on both streams."""

    reference: Walk
    quantized: Walk

    @property
    def name(self) -> str | None:
        """The path of the block that comes next; None at the end."""
        return self.reference.name

    def inputs(self, joins: bool = True) -> Activations:
        """What the block is called with."""
        return Activations(Inputs(self.reference.calls, joins), Inputs(self.quantized.calls, joins))


@dataclass(frozen=True)
class StreamErrors:
    """The relative squared errors of each linear's output on the reference inputs, and of the block's output.

    A linear that no token reached has none.
    """

    linears: Mapping[str, float]
    block: float


@contextmanager
def enter(skeleton: Skeleton, tokens: Int[Tensor, "N T"]) -> Iterator[Stream]:
    """A context with both streams in front of the first block."""
    with skeleton.walk(tokens) as reference, skeleton.walk(tokens) as quantized:
        yield Stream(reference, quantized)


def statistics(block: Block, inputs: Inputs) -> tuple[dict[str, LinearStats], list[Tensor]]:
    """Statistics of every linear's input on the full-precision stream, and the block's full-precision outputs.

    Linears that no token reached have no statistics.
    """
    sums = _Sums({group.linears[0] for group in block.topology.groups})
    with tapping(block, sums):
        outputs = list(outputs_of(block, {}, inputs))
    results = {
        name: sums.result(group.linears[0])
        for group in block.topology.groups
        if group.linears[0] in sums.tokens
        for name in group.linears
    }
    return results, outputs


@contextmanager
def tapping(block: Block, tap: Any) -> Iterator[None]:
    """A context in which a tap sees what a block's linears read."""
    block.taps.append(tap)
    try:
        yield
    finally:
        block.taps.remove(tap)


class _Sums:
    """Running statistics of linears' inputs."""

    def __init__(self, wanted: set[str]) -> None:
        self.wanted = wanted
        self.tokens: dict[str, int] = {}
        self.least, self.most, self.magnitude = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()

    def inputs(self, linears: Sequence[str], x: Tensor) -> None:
        """Add one batch."""
        x = x.detach().flatten(0, -2).float()
        for name in linears:
            if name not in self.wanted or not len(x):
                continue
            low, high = x.aminmax(dim=0)
            total = x.abs().sum(dim=0, dtype=torch.float64)
            if name in self.tokens:
                low, high = torch.minimum(low, self.least[name]), torch.maximum(high, self.most[name])
                total = total + self.magnitude[name]
            self.least[name], self.most[name], self.magnitude[name] = low, high, total
            self.tokens[name] = self.tokens.get(name, 0) + len(x)

    def outputs(self, linear: str, rows: slice, x: Tensor, y: Tensor) -> None:
        """Nothing to see."""

    def result(self, name: str) -> LinearStats:
        """The statistics of all batches."""
        tokens = self.tokens[name]
        return LinearStats(tokens, self.least[name], self.most[name], (self.magnitude[name] / tokens).float())


def advance(
    block: Block, folded: Folded, written: Mapping[str, Tensor], scheme: Scheme, stream: Stream, joins: bool = True
) -> StreamErrors:
    """Advance both streams by a block; return the errors of its quantized weights (and activations)."""
    errors = _Errors(folded, written)
    if folded.transformed:
        with tapping(block, errors):
            for _ in outputs_of(block, folded.full, stream.inputs(joins).reference):  # only the errors are needed
                pass
    # the stream itself comes from the original's weights, so that a continued run sees the same
    full, taps = ({}, []) if folded.transformed else (folded.full, [errors])
    error = _go_on(block, full, written, scheme, stream, joins, taps)
    return StreamErrors(errors.linears(), error)


def replay(block: Block, written: Mapping[str, Tensor], scheme: Scheme, stream: Stream, joins: bool = True) -> None:
    """Advance both streams by a block that is finished already."""
    _go_on(block, {}, written, scheme, stream, joins, ())


@torch.no_grad()
def _go_on(
    block: Block,
    full: Mapping[str, Tensor],
    written: Mapping[str, Tensor],
    scheme: Scheme,
    stream: Stream,
    joins: bool,
    taps: Sequence[Any],
) -> float:
    """Advance both streams, a batch at a time, and return the relative error of the block's output.

    ``taps`` look at the full-precision pass.
    """
    full, written = placed(block, full), placed(block, written)
    inputs, error, signal = stream.inputs(joins), 0.0, 0.0
    for rows in inputs.reference.batches():
        with ExitStack() as stack:
            for tap in taps:
                stack.enter_context(tapping(block, tap))
            wanted = _passed(block, full, inputs.reference, rows)
        with quantized_activations(block, scheme):
            results = _passed(block, written, inputs.quantized, rows)
        for row, right, mine in zip(rows, wanted, results, strict=True):
            reference = hidden_of(right)
            error, signal = error + _squares(hidden_of(mine) - reference), signal + _squares(reference)
            stream.reference.send(row, right)
            stream.quantized.send(row, mine)
    stream.reference.turn()
    stream.quantized.turn()
    return _ratio(error, signal)


def _passed(block: Block, tensors: Mapping[str, Tensor], inputs: Inputs, rows: Sequence[int]) -> list[Any]:
    """What a block returns for some segments, on the CPU; what it adds to their dictionaries is handed back."""
    calls, call = [inputs.calls[row] for row in rows], inputs.call(rows, block)
    results = split(run(block, tensors, call), calls)
    hand_back(call, calls)
    return [mapped(result, Tensor.cpu) for result in results]


class _Errors:
    """The squares of the error of every linear's output, and of its output, without biases."""

    def __init__(self, folded: Folded, written: Mapping[str, Tensor]) -> None:
        self.sums = dict[str, tuple[float, float]]()
        weights = {name: folded.full[f"{name}.weight"] for name in folded.linears}
        self.differences = {name: written[f"{name}.weight"].to(full) - full for name, full in weights.items()}

    def inputs(self, linears: Sequence[str], x: Tensor) -> None:
        """Nothing to see."""

    def outputs(self, linear: str, rows: slice, x: Tensor, y: Tensor) -> None:
        """Add the outputs of some rows of a linear."""
        error, signal = self.sums.get(linear, (0.0, 0.0))
        off = nn.functional.linear(x, self.differences[linear][rows].to(x))
        self.sums[linear] = error + _squares(off), signal + _squares(y)

    def linears(self) -> dict[str, float]:
        """The relative errors."""
        return {name: _ratio(*sums) for name, sums in self.sums.items()}


def _squares(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values.float()).double() ** 2)


def _ratio(error: float, signal: float) -> float:
    return error / signal if signal > 0 else 0.0 if error == 0 else float("inf")
