"""The sink: it takes finished units from any driver, and notes them in the journal."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from bitwright.checkpoint.journal import Journal
from bitwright.core.account import BlockReport
from bitwright.core.errors import OutputError
from bitwright.stream.parts import Part, learned_file, part_file

JOURNAL = "journal.jsonl"


class Sink:
    """The collector of finished units: their parts are numbered in the order of the model, and noted as they come."""

    def __init__(self, folder: Path, journal: Journal, units: Sequence[str]) -> None:
        """``units`` are the names of all units, in the order of the model."""
        self.folder, self.journal = folder, journal
        self.files = {unit: part_file(number) for number, unit in enumerate(units)}
        self.peaks: dict[int, int] = {}

    @property
    def done(self) -> frozenset[str]:
        """The units that are in the journal, and whose parts are on disk."""
        return frozenset(self.journal.done)

    @property
    def parts(self) -> list[Path]:
        """The path of every unit's part, in the order of the model; parts that have been merged are gone."""
        return [self.folder / file for file in self.files.values()]

    @property
    def reports(self) -> tuple[BlockReport, ...]:
        """The reports of the blocks, in order; the reports of several parts of a block are joined."""
        reports: dict[str, BlockReport] = {}
        for unit in self.files:
            if entry := self.journal.recorded[unit]["report"]:
                report = self._report(unit, entry)
                before = reports.get(report.name)
                linears = report.linears if before is None else before.linears + report.linears
                reports[report.name] = replace(before or report, linears=linears)
        return tuple(reports.values())

    def _report(self, unit: str, entry: Mapping[str, Any]) -> BlockReport:
        """Read the report of a unit from the journal. Raises OutputError if no run has written it."""
        try:
            return BlockReport.from_json(entry)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise OutputError(
                f"{self.journal.path}: the report of {unit} is damaged: {error!r}; begin anew with --restart"
            ) from error

    @property
    def learned(self) -> dict[str, Tensor]:
        """The parameters that training found, as ``BLOCK/GROUP/NAME``."""
        files = {unit: self.folder / learned_file(file) for unit, file in self.files.items()}
        learned = {unit: load_file(file) for unit, file in files.items() if file.exists()}
        return {f"{unit}/{name}": tensor for unit, tensors in learned.items() for name, tensor in tensors.items()}

    @property
    def peak_bytes(self) -> int:
        """The peak memory of all worker processes together."""
        return sum(self.peaks.values())

    def take(self, units: Iterable[Part]) -> None:
        """Note each unit of a driver as it comes. Raises OutputError, and the errors of the driver."""
        for part in units:
            self.note(part)

    def note(self, part: Part) -> None:
        """Note one unit whose part is durable. Raises OutputError."""
        report = {} if part.report is None else part.report.to_json()
        self.journal.record(part.unit, part.file, report, part.digests)
        if part.process:
            self.peaks[part.process] = part.peak_bytes
