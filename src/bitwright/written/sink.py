"""Finished blocks, made durable one by one: encoded by the format, written as a part, noted in the journal."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bitwright.checkpoint.journal import Journal
from bitwright.checkpoint.ranges import Stored
from bitwright.checkpoint.writer import write_tensors
from bitwright.core.block import Block
from bitwright.core.errors import OutputError
from bitwright.core.quantized import BlockReport, QuantizedBlock
from bitwright.core.tensor_bytes import digest
from bitwright.prepare.job import Job
from bitwright.stream.units import Unit


class FolderSink:
    """Parts in a work folder, numbered in the order of the model, whatever order they are written in."""

    def __init__(self, folder: Path, journal: Journal, job: Job) -> None:
        self.folder, self.journal, self.job = folder, journal, job
        self.files = {unit: f"part-{n:05d}.safetensors" for n, unit in enumerate(job.work.units)}

    def parts(self) -> list[Path]:
        """Every unit's part, in the order of the model; some may have been merged away."""
        return [self.folder / file for file in self.files.values()]

    def reports(self) -> list[dict[str, Any]]:
        """The reports of the blocks, in their order; what several parts say of one block is one report."""
        found: dict[str, dict[str, Any]] = {}
        for unit in self.files:
            report = self.journal.recorded[unit]["report"]
            if report and report["name"] in found:
                found[report["name"]]["linears"] += report["linears"]
            elif report:
                found[report["name"]] = {**report, "linears": [*report["linears"]]}
        return list(found.values())

    def finished(self, unit: str) -> bool:
        """Whether the journal has this unit, and its part is there."""
        return unit in self.journal.done

    def written(self, unit: str, block: Block) -> Mapping[str, Tensor]:
        """The parameters of a finished block read back from its part, weights dequantized."""
        part = self.folder / self.files[unit]
        try:
            tensors = load_file(part)
        except (OSError, SafetensorError) as error:
            raise OutputError(
                f"{part}: what an earlier run wrote is damaged: {error}; begin anew with --restart"
            ) from error
        decode, grid = self.job.format.decode, self.job.scheme.weight
        weights = {f"{name}.weight": decode(tensors, block.path(name), grid) for name in block.topology.linears}
        names = [name for name, _ in block.module.named_parameters() if name not in weights]
        return weights | {name: tensors[block.path(name)] for name in names}

    def write(self, unit: str, result: QuantizedBlock) -> None:
        """Writes a unit's part and notes it, with its report, in the journal."""
        tensors: dict[str, Tensor | Stored] = dict(result.passed)
        digests = dict[str, str]()
        for name, weight in result.linears.items():
            tensors |= (made := self.job.format.encode(name, weight))
            digests[name] = digest(made)
        rows = tuple(replace(row, digest=digests[row.name]) for row in result.report.linears)
        if result.learned:
            write_tensors(self._learned(unit), result.learned)
        write_tensors(self.folder / self.files[unit], tensors)
        self.journal.record(unit, self.files[unit], asdict(replace(result.report, linears=rows)))

    def learned(self) -> dict[str, Tensor]:
        """The parameters that training found, as ``BLOCK/GROUP/NAME``."""
        found = {unit: load_file(self._learned(unit)) for unit in self.files if self._learned(unit).exists()}
        return {f"{unit}/{name}": tensor for unit, tensors in found.items() for name, tensor in tensors.items()}

    def made(self, unit: Unit, report: BlockReport | None) -> None:
        """Notes a unit whose part has been written already."""
        self.journal.record(unit.name, unit.file, asdict(report) if report else {})

    def _learned(self, unit: str) -> Path:
        return self.folder / self.files[unit].replace("part", "learned")
