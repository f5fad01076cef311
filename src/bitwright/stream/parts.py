"""Parts: the finished units of a driver, durable on disk, with their reports.

Drivers (``blocks``, ``tensors``, ``convert``) differ in what they iterate over, but all yield ``Part``. Letters in
shapes: O output features, I input features, R rows of a panel.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bitwright.checkpoint.ranges import Stored
from bitwright.checkpoint.writer import write_tensors
from bitwright.core.account import BlockReport, LinearReport
from bitwright.core.errors import OutputError
from bitwright.core.format import Format, TensorFormat
from bitwright.core.grid import Grid
from bitwright.core.progress import Listener
from bitwright.core.qtensor import QTensor
from bitwright.core.scheme import Scheme
from bitwright.core.tensor_bytes import digest
from bitwright.steps.outliers import TELLING

Encoded = tuple[dict[str, Tensor], LinearReport]
"""The tensors of a linear as they are stored, and its report without a digest."""


@dataclass(frozen=True)
class Part:
    """A unit whose part is durable; ``report`` is None if nothing in it is quantized.

    ``digests`` are those of its files by their names. ``process`` is the number of the worker process that made it, and
    ``peak_bytes`` the peak memory of that process; both are 0 if this process made it.
    """

    unit: str
    file: str
    report: BlockReport | None
    digests: Mapping[str, str] = field(default_factory=dict)
    process: int = 0
    peak_bytes: int = 0


Written = Callable[[Part], None]
"""A function that is called with each unit as soon as its part is durable, from any thread."""


class Driver(Protocol):
    """A source of parts: from blocks, from tensors, or from a quantized folder."""

    @property
    def units(self) -> Sequence[str]:
        """The names of all units, in the order of the model."""

    def parts(self, files: Mapping[str, str], done: Collection[str], listener: Listener) -> Iterator[Part]:
        """Make every unit that is not done, and yield it once its part is durable. Raises UserError.

        ``files`` are the names of the parts by unit.
        """


class LinearSums:
    """Sums for the report of one linear, or of a weight that is fused over experts, added slice by slice."""

    def __init__(self, name: str, shape: tuple[int, ...], writer: "PartWriter") -> None:
        """``shape`` is [O, I], or [E, A, B] with one slice [A, B] per expert."""
        self.name, self.shape, self.writer = name, shape, writer
        self.outliers, self.error, self.size = 0, 0.0, 0.0
        self.last: QTensor | None = None

    def compare(self, weight: Float[Tensor, "R I"], quantized: QTensor) -> None:
        """Add the error of some rows; a weight on a GPU is compared there."""
        self.size += _square(weight)
        self.error += _square(weight - quantized.dequantize().to(weight))

    def add(self, quantized: QTensor) -> QTensor:
        """Add the outliers of a whole slice, and return it."""
        self.last = quantized
        self.outliers += 0 if quantized.outlier_index is None else quantized.outlier_index.numel()
        return quantized

    def report(self, output_error: float | None = None, scheme: str = "") -> LinearReport:
        """The report; experts in one tensor count as one linear that has the rows of all."""
        assert self.last is not None, "a linear has a slice"
        weights, last = prod(self.shape), self.last
        own = Scheme(last.grid, last.tile)
        bits = self.writer.target.stored_bits(self.shape, own, last.scale.dtype, self.outliers)
        return LinearReport(
            name=self.name,
            shape=(weights // self.shape[-1], self.shape[-1]),
            tile=last.tile.size(last.shape),
            bits_per_weight=bits / weights,
            storage_bits=bits,
            weight_error=self.error / self.size if self.size else 0.0,
            output_error=output_error,
            outliers=self.outliers,
            outlier_share=self.outliers / weights,
            scheme=scheme,
        )


@dataclass(frozen=True)
class PartWriter:
    """A writer of parts into a folder; it is sent to worker processes.

    ``format`` makes the tensors; ``target`` is the format of the result, and counts the bits.
    """

    folder: Path
    format: TensorFormat
    target: Format

    def write(
        self,
        unit: str,
        file: str,
        report: BlockReport | None,
        linears: Sequence[Encoded],
        passed: Mapping[str, Tensor | Stored],
        learned: Mapping[str, Tensor] | None = None,
    ) -> Part:
        """Write a unit's part: its linears, and the tensors that stay; learned parameters get a file beside it.

        ``report`` is the unit's report without its linears. Raises OutputError.
        """
        tensors = dict(passed)
        for stored, _ in linears:
            tensors |= stored
        files = {file: tensors} | ({learned_file(file): learned} if learned else {})
        digests = {name: write_tensors(self.folder / name, held) for name, held in files.items()}
        rows = tuple(replace(row, digest=digest(stored)) for stored, row in linears)
        return Part(unit, file, None if report is None else replace(report, linears=rows), digests)

    def read(self, file: str, grids: Mapping[str, Grid], stacks: Mapping[str, Grid] | None = None) -> dict[str, Tensor]:
        """Read a part: the linears of ``grids`` are dequantized as ``NAME.weight``, other tensors are as stored.

        ``stacks`` are weights [E, A, B], by their tensors' names, which are dequantized too.

        Raises OutputError for a part that is damaged.
        """
        part = self.folder / file
        try:
            tensors = load_file(part)
        except (OSError, SafetensorError) as error:
            raise OutputError(
                f"{part}: what an earlier run wrote is damaged: {error}; begin anew with --restart"
            ) from error
        dense = {f"{name}.weight": self.format.decode(tensors, name, grid) for name, grid in grids.items()}
        whole = {name: self.format.decode_stacked(tensors, name, grid) for name, grid in (stacks or {}).items()}
        return tensors | dense | whole


def part_file(number: int) -> str:
    """The file name of the part of a unit, by the unit's number in the order of the model."""
    return f"part-{number:05d}.safetensors"


def learned_file(file: str) -> str:
    """The name of the file with the learned parameters of a part."""
    return file.replace("part", "learned")


def _square(values: Float[Tensor, "R I"]) -> float:
    """The sum of squares, also of values whose squares float32 cannot hold."""
    norm = float(torch.linalg.vector_norm(values))
    if not TELLING < norm < 1 / TELLING and bool(values.isfinite().all()):
        norm = float(torch.linalg.vector_norm(values.double()))
    return norm**2
