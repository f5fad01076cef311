"""One tensor in memory at a time: what needs no model is read, quantized, encoded and written.

Reading runs ahead of the arithmetic and writing behind it, each in a thread of its own. The same ``work`` is done in
this process, in worker processes (``parallel.py``) and on other machines (``ranks.py``).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from bitwright.checkpoint.ranges import Stored, is_finite
from bitwright.checkpoint.reader import Checkpoint
from bitwright.checkpoint.writer import write_tensors
from bitwright.core.configuration import Configured
from bitwright.core.decisions import LinearDecision
from bitwright.core.method import DataFree, WeightContext
from bitwright.core.panels import panels
from bitwright.core.qtensor import QTensor
from bitwright.core.quantized import BlockReport, LinearReport
from bitwright.core.scheme import Scheme
from bitwright.core.tensor_bytes import digest
from bitwright.core.weight import Weight
from bitwright.steps.apply import quantize_linear, require_held
from bitwright.steps.outliers import TELLING, bounds_of
from bitwright.stream.memory import keep_freed_memory
from bitwright.stream.units import Unit

T = TypeVar("T")
_END = object()


@dataclass(frozen=True)
class TensorPlan:
    """What to do with every weight, in a form that can be handed to another process.

    ``methods`` are data-free. ``dtype`` is that of scales and outliers. ``encode`` makes the tensors of a linear,
    ``encode_stacked`` those of experts in one tensor; ``folder`` takes the parts.
    """

    checkpoint: Checkpoint
    dtype: torch.dtype
    scheme: Scheme
    methods: tuple[Configured, ...]
    device: str
    encode: Callable[[str, QTensor], dict[str, Tensor]]
    encode_stacked: Callable[[str, Sequence[QTensor]], dict[str, Tensor]]
    folder: Path


Started = Callable[[str], None]
Finished = Callable[[Unit, BlockReport | None], None]


def work(units: Iterable[Unit], plan: TensorPlan, started: Started, finished: Finished) -> None:
    """Makes the part of every unit. ``finished`` is called from other threads when the part of a unit is durable;
    ``started`` with each tensor before its arithmetic. Raises UserError.

    A unit that is only copied, such as a large embedding, is only looked at: its part is empty, and nothing waits.
    """
    keep_freed_memory()
    with ThreadPoolExecutor(1, "behind") as behind, ThreadPoolExecutor(1, "aside") as aside:
        writing, copying = list[Future[None]](), list[Future[None]]()
        for _, read in groupby(_one_ahead(_read(units, plan)), lambda item: item[0].name):
            made = _made(read, plan, started)
            if not made.unit.weights:
                copying.append(aside.submit(_write, made, plan, finished))
                continue
            for future in (*writing, *filter(Future.done, copying)):
                future.result()
            writing = [behind.submit(_write, made, plan, finished)]
        for future in (*writing, *copying):
            future.result()


_Read = tuple[Unit, Weight | None, Tensor]
_NOTHING = torch.empty(0, dtype=torch.uint8)


def _read(units: Iterable[Unit], plan: TensorPlan) -> Iterator[_Read]:
    """Every slice of every weight, as it is stored; a unit without weights comes once, with nothing.

    A slice lasts until the next but one: to get memory from the kernel costs more than to read into it.
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
    """One slice, finite throughout, in this memory. Raises CheckpointError."""
    name, rows = weight.tensor, weight.slice[0]
    if weight.stacked:
        stored = checkpoint.read_slice(name, number, number + 1, memory)[0]
    else:
        stored = checkpoint.read_slice(name, 0, rows, memory)
    if not is_finite(stored):
        checkpoint.check_finite_tensor(name)
    return stored


@dataclass
class _Made:
    """What has become of a unit so far: the tensors of each linear, with the account of it."""

    unit: Unit
    linears: list[tuple[dict[str, Tensor], LinearReport]] = field(default_factory=list)


def _made(read: Iterator[_Read], plan: TensorPlan, started: Started) -> _Made:
    """The tensors of a unit, and the account of its linears."""
    first = next(read)
    made = _Made(first[0])
    for weight, slices in groupby(chain((first,), read), itemgetter(1)):
        if weight is None:
            continue
        started(weight.tensor)
        account = _Account(weight)
        quantized = (_quantized(stored, weight, plan, account) for _, _, stored in slices)
        if weight.stacked:
            tensors = plan.encode_stacked(weight.tensor, list(quantized))
        else:
            tensors = plan.encode(weight.name, next(quantized))
        made.linears.append((tensors, account.report()))
    return made


def _write(made: _Made, plan: TensorPlan, finished: Finished) -> None:
    tensors = dict[str, Tensor | Stored]()
    for encoded, _ in made.linears:
        tensors |= encoded
    for name in made.unit.copied:
        plan.checkpoint.check_finite_tensor(name)
        if made.unit.weights:
            tensors[name] = plan.checkpoint.stored(name)
    write_tensors(plan.folder / made.unit.file, tensors)
    rows = tuple(replace(report, digest=digest(encoded)) for encoded, report in made.linears)
    finished(made.unit, BlockReport(made.unit.block, rows) if rows else None)


@torch.no_grad()
def _quantized(stored: Float[Tensor, "O I"], weight: Weight, plan: TensorPlan, account: "_Account") -> QTensor:
    """A linear, a panel of rows at a time."""
    scheme = replace(plan.scheme, tile=weight.tile(plan.scheme.tile))
    contexts = [_context(stored, weight, scheme, configured, plan) for configured in plan.methods]
    parts = []
    for here in _rows(stored, scheme, contexts):
        panel, decided = stored[here].to(plan.device, torch.float32), LinearDecision()
        for configured, context in zip(plan.methods, contexts, strict=True):
            assert isinstance(configured.method, DataFree)
            decided = configured.method.decide(panel, context, decided)
        part = quantize_linear(panel, decided, scheme, plan.dtype)
        require_held(weight.name, panel, part)
        account.compare(panel, part)
        parts.append(part)
    return account.add(QTensor.of_rows(parts))


def _context(
    stored: Tensor, weight: Weight, scheme: Scheme, configured: Configured, plan: TensorPlan
) -> WeightContext[Any]:
    """What one method sees beside a weight."""
    freedom = configured.freedom(plan.scheme)
    tiles = freedom.tiles if weight.takes_tiles(freedom.compared) else ()
    outliers = bounds_of(stored, scheme.tile, freedom.outliers, plan.device)
    return WeightContext(configured.settings(scheme), scheme, plan.dtype, tiles, outliers)


def _rows(stored: Tensor, scheme: Scheme, contexts: Iterable[WeightContext[Any]]) -> list[slice]:
    """The panels of a weight; only one if a method chooses between tiles by the whole of it."""
    if any(context.tiles for context in contexts):
        return [slice(None)]
    return panels((stored.shape[0], stored.shape[1]), scheme.tile)


def _square(values: Float[Tensor, "R I"]) -> float:
    """The sum of the squares, also of values whose squares float32 does not hold."""
    norm = float(torch.linalg.vector_norm(values))
    if not TELLING < norm < 1 / TELLING and bool(values.isfinite().all()):
        norm = float(torch.linalg.vector_norm(values.double()))
    return norm**2


class _Account:
    """The sums over the slices of a weight that its report is made of."""

    def __init__(self, weight: Weight) -> None:
        self.weight, self.bits, self.outliers, self.error, self.size = weight, 0, 0, 0.0, 0.0
        self.tile = (0, 0)

    def compare(self, panel: Float[Tensor, "R I"], made: QTensor) -> None:
        """Adds what is lost of some rows."""
        self.size += _square(panel)
        self.error += _square(panel - made.dequantize().float())

    def add(self, made: QTensor) -> QTensor:
        """Adds what a slice takes; the slice."""
        self.tile = made.tile.size(made.shape)
        self.bits += made.storage_bits
        self.outliers += 0 if made.outlier_index is None else made.outlier_index.numel()
        return made

    def report(self) -> LinearReport:
        """The account of the weight; experts in one tensor count as one linear with the rows of all of them."""
        rows, columns = self.weight.slice
        return LinearReport(
            name=self.weight.name,
            shape=(self.weight.slices * rows, columns),
            tile=self.tile,
            bits_per_weight=self.bits / (self.weight.slices * rows * columns),
            storage_bits=self.bits,
            weight_error=self.error / self.size if self.size else 0.0,
            output_error=None,
            outliers=self.outliers,
            outlier_share=self.outliers / (self.weight.slices * rows * columns),
        )


def _one_ahead(items: Iterable[T]) -> Iterator[T]:
    """The items, each made by another thread while the one before it is used; an item's error comes in its place."""
    with ThreadPoolExecutor(1, "ahead") as thread:
        source = iter(items)
        coming = thread.submit(next, source, _END)
        while (item := coming.result()) is not _END:
            coming = thread.submit(next, source, _END)
            yield item  # type: ignore[misc]
