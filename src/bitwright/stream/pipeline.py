"""One tensor in memory at a time: read it, quantize it, encode it, write it. This needs no model.

One thread reads ahead of the arithmetic, another writes behind it. ``pipeline`` runs in this process, in worker
processes (``parallel.py``) and on other machines (``ranks.py``).
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, groupby
from operator import itemgetter
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from bitwright.checkpoint.ranges import Stored, is_finite
from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.account import BlockReport
from bitwright.core.configuration import Configured
from bitwright.core.decisions import LinearDecision
from bitwright.core.method import DataFree, WeightContext
from bitwright.core.panels import panels
from bitwright.core.qtensor import QTensor
from bitwright.core.scheme import Scheme
from bitwright.core.weight import Weight
from bitwright.steps.apply import quantize_linear, require_held
from bitwright.steps.outliers import bounds_of
from bitwright.stream.memory import keep_freed_memory
from bitwright.stream.parts import Encoded, LinearSums, PartWriter, Written
from bitwright.stream.run_plan import RunPlan
from bitwright.stream.units import Unit

T = TypeVar("T")
_END = object()


@dataclass(frozen=True)
class TensorPlan:
    """The plan for every weight, in a form that can be sent to another process.

    The methods of ``run`` are data-free. ``parts`` writes the parts.
    """

    checkpoint: Checkpoint
    run: RunPlan
    device: str
    writer: PartWriter


Started = Callable[[str], None]
"""A function that is called with the name of each tensor before its arithmetic."""


def pipeline(units: Iterable[Unit], plan: TensorPlan, started: Started, written: Written) -> Iterator[Unit]:
    """Make the part of every unit, and yield each unit when its part is handed to the writing thread. Raises UserError.

    A unit that is only copied, such as a large embedding, is only checked, in the background; its part is empty.
    """
    keep_freed_memory()
    with ThreadPoolExecutor(1, "behind") as behind, ThreadPoolExecutor(1, "aside") as aside:
        writing, copying = list[Future[None]](), list[Future[None]]()
        for _, read in groupby(_one_ahead(_read(units, plan)), lambda item: item[0].name):
            quantized = _quantized_unit(read, plan, started)
            if not quantized.unit.weights:
                copying.append(aside.submit(_write, quantized, plan, written))
            else:
                for future in (*writing, *filter(Future.done, copying)):
                    future.result()
                writing = [behind.submit(_write, quantized, plan, written)]
            yield quantized.unit
        for future in (*writing, *copying):
            future.result()


_Read = tuple[Unit, Weight | None, Tensor]
_NOTHING = torch.empty(0, dtype=torch.uint8)


def _read(units: Iterable[Unit], plan: TensorPlan) -> Iterator[_Read]:
    """Read every slice of every weight, as it is stored; a unit without weights comes once, without a slice.

    The memory of a slice is used again for the slice after the next: getting new memory costs more than reading.
    """
    memory = [_NOTHING, _NOTHING]
    for unit in units:
        if not unit.weights:
            yield unit, None, _NOTHING
        for weight in unit.weights:
            for number in range(weight.slices):
                memory.reverse()
                if len(memory[0]) < (nbytes := plan.checkpoint.nbytes(weight.tensor) // weight.slices):
                    memory[0] = torch.empty(nbytes, dtype=torch.uint8)
                yield unit, weight, _slice(plan.checkpoint, weight, number, memory[0])


def _slice(checkpoint: Checkpoint, weight: Weight, number: int, memory: Tensor) -> Float[Tensor, "O I"]:
    """Read one slice into ``memory``. Raises CheckpointError if it has a NaN or infinity."""
    name, rows = weight.tensor, weight.slice[0]
    if weight.stacked:
        stored = checkpoint.read_slice(name, number, number + 1, memory)[0]
    else:
        stored = checkpoint.read_slice(name, 0, rows, memory)
    if not is_finite(stored):
        checkpoint.check_finite_tensor(name)
    return stored


@dataclass
class _Quantized:
    """A quantized unit: its linears as they will be stored, with their reports."""

    unit: Unit
    linears: list[Encoded] = field(default_factory=list)


def _quantized_unit(read: Iterator[_Read], plan: TensorPlan, started: Started) -> _Quantized:
    """Quantize and encode the linears of a unit."""
    first = next(read)
    unit = _Quantized(first[0])
    for weight, slices in groupby(chain((first,), read), itemgetter(1)):
        if weight is None:
            continue
        started(weight.tensor)
        sums = LinearSums(weight.name, weight.shape, plan.writer)
        quantized = (_quantized(stored, weight, plan, sums) for _, _, stored in slices)
        if weight.stacked:
            tensors = plan.writer.format.encode_stacked(weight.tensor, list(quantized))
        else:
            tensors = plan.writer.format.encode(weight.name, next(quantized))
        own = plan.run.allocation.own.get(weight.name)
        unit.linears.append((tensors, sums.report(scheme="" if own is None else str(own))))
    return unit


def _write(quantized: _Quantized, plan: TensorPlan, written: Written) -> None:
    unit, copied = quantized.unit, dict[str, Tensor | Stored]()
    for name in unit.copied:
        plan.checkpoint.check_finite_tensor(name)
        if unit.weights:
            copied[name] = plan.checkpoint.stored(name)
    report = BlockReport(unit.block, ()) if quantized.linears else None
    written(plan.writer.write(unit.name, unit.file, report, quantized.linears, copied))


@torch.no_grad()
def _quantized(stored: Float[Tensor, "O I"], weight: Weight, plan: TensorPlan, sums: LinearSums) -> QTensor:
    """Quantize a linear, a panel of rows at a time."""
    scheme = weight.scheme(plan.run.allocation.scheme(weight.name))
    contexts = [_context(stored, weight, scheme, configured, plan) for configured in plan.run.methods]
    parts = []
    for here in _rows(stored, scheme, contexts):
        panel, decided = stored[here].to(plan.device, torch.float32), LinearDecision()
        for configured, context in zip(plan.run.methods, contexts, strict=True):
            assert isinstance(configured.method, DataFree)
            decided = configured.method.decide(panel, context, decided)
        part = quantize_linear(panel, decided, scheme, plan.run.scales)
        require_held(weight.name, panel, part)
        sums.compare(panel, part)
        parts.append(part)
    return sums.add(QTensor.of_rows(parts))


def _context(
    stored: Tensor, weight: Weight, scheme: Scheme, configured: Configured, plan: TensorPlan
) -> WeightContext[Any]:
    """The context that one method gets with a weight."""
    freedom = configured.freedom(plan.run.allocation.scheme(weight.name))
    tiles = freedom.tiles if weight.takes_tiles(freedom.compared) else ()
    outliers = bounds_of(stored, scheme.tile, freedom.outliers, plan.device)
    return WeightContext(configured.settings(scheme), scheme, plan.run.scales, tiles, outliers)


def _rows(stored: Tensor, scheme: Scheme, contexts: Iterable[WeightContext[Any]]) -> list[slice]:
    """The panels of a weight; a single one if a method chooses between tiles by the whole weight."""
    if any(context.tiles for context in contexts):
        return [slice(None)]
    return panels((stored.shape[0], stored.shape[1]), scheme.tile)


def _one_ahead(items: Iterable[T]) -> Iterator[T]:
    """Yield the items; another thread makes the next while one is used. An error is raised in its item's place."""
    with ThreadPoolExecutor(1, "ahead") as thread:
        source = iter(items)
        coming = thread.submit(next, source, _END)
        while (item := coming.result()) is not _END:
            coming = thread.submit(next, source, _END)
            yield item  # type: ignore[misc]
