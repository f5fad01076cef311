"""The driver of an export: it converts the linears of a quantized folder block by block."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from bitwright.convert.refitting import Groups, refitted
from bitwright.core.account import BlockReport, LinearReport
from bitwright.core.convert import relative_error
from bitwright.core.errors import RecipeError
from bitwright.core.format import TensorFormat
from bitwright.core.progress import Listener, Progress
from bitwright.core.quantized import WrittenModel, departures
from bitwright.core.scheme import Scheme
from bitwright.formats import QuantizedFolder
from bitwright.model.source import family_of
from bitwright.model.view import ModelView
from bitwright.stream.memory import peak_memory
from bitwright.stream.parts import Encoded, LinearSums, Part, PartWriter
from bitwright.stream.units import block_of

OUTSIDE = "outside of the blocks"


@dataclass(frozen=True)
class Conversion:
    """A driver that converts a quantized folder to another format.

    If ``lossy``, weights that the format cannot hold are quantized again.
    """

    model: QuantizedFolder
    writer: PartWriter
    lossy: bool

    @cached_property
    def contents(self) -> dict[str, tuple[list[str], list[str]]]:
        """The names of linears, and of other tensors, by unit."""
        units: dict[str, tuple[list[str], list[str]]] = {}
        for kind, names in enumerate((self.model.linears, self.model.passed)):
            for name in names:
                units.setdefault(block_of(name) or OUTSIDE, ([], []))[kind].append(name)
        return units

    @property
    def units(self) -> list[str]:
        """The names of the units: the blocks, and one for all that is outside of them."""
        return list(self.contents)

    @cached_property
    def groups(self) -> Groups:
        """The sizes of groups that the linears can have in common."""
        return Groups.of(self.model.outline(name) for name in self.model.linears)

    def parts(self, files: Mapping[str, str], done: Collection[str], listener: Listener) -> Iterator[Part]:
        """Convert every unit that is not done; ``files`` are the parts by unit. Raises RecipeError, CheckpointError."""
        finished = sum(unit in done for unit in self.contents)
        if finished:
            listener(Progress("export", finished, len(self.units), "parts", resumed=True))
        for number, (unit, (linears, passed)) in enumerate(self.contents.items()):
            if unit not in done:
                listener(Progress("export", number, len(self.units), unit, peak_memory()))
                tensors = {name: self.model.checkpoint.stored(name) for name in passed}
                encoded = [self._encoded(name) for name in linears]
                yield self.writer.write(unit, files[unit], BlockReport(unit, ()), encoded, tensors)
        listener(Progress("export", len(self.units), len(self.units), "all parts", peak_memory()))

    def _encoded(self, name: str) -> Encoded:
        """A linear as the new format stores it, with its report."""
        format, read = self.writer.format, self.model.read(name)
        weight, lost = refitted(name, read, format, self.lossy, self.groups)
        tensors, error = format.encode(name, weight), lost.error
        if format.reader is None:  # the format stores no codes but weights, rounded to their dtype
            stored = format.decode(tensors, name, weight.grid).float()
            error = relative_error(read.dequantize(torch.float32), stored)
        sums = LinearSums(name, weight.shape, self.writer)
        sums.add(weight)
        report = sums.report(scheme=str(Scheme(weight.grid, weight.tile)))
        return tensors, replace(report, weight_error=error, codes_kept=lost.codes)

    def written_model(self, rows: Sequence[LinearReport]) -> WrittenModel:
        """The description of the written model. Raises RecipeError as ``written_model``."""
        return written_model(self.model, self.writer.format, rows, self._kept_linears())

    def _kept_linears(self) -> tuple[str, ...]:
        """The linears that are not quantized, by their names in the model.

        If transformers knows the model, they are its other linears, else those that the folder names; some formats do
        not name all.
        """
        model = self.model
        quantized = {f"{linear}.weight" for linear in model.linears}
        view = ModelView.of(model.checkpoint, (*model.passed, *quantized))
        if view is None:
            kept = () if model.described is None else model.described.kept
            return tuple(sorted({*kept, "lm_head"} - set(model.linears)))
        return tuple(sorted(view.linears - {view.linear(name) for name in quantized}))


def written_model(
    model: QuantizedFolder, format: TensorFormat, rows: Sequence[LinearReport], kept: tuple[str, ...]
) -> WrittenModel:
    """The description of a folder that is written: most linears have the model's scheme, others their own.

    ``rows`` are the reports of the linears, ``kept`` the linears that are not quantized. Raises RecipeError for linears
    with schemes of their own if the format has one for all.
    """
    described = model.described
    assert described is not None, "a quantized folder says how"
    bits = [None if grid is None else grid.bits for grid in (described.activations, described.kv)]
    counted = Counter(row.scheme for row in rows)
    schemes = {text: Scheme.parse(text).with_activations(*bits) for text in counted}
    unlike = {
        text: {row.name: schemes[row.scheme] for row in rows if not _fits(row, schemes[row.scheme], scheme)}
        for text, scheme in schemes.items()
    }
    most = min(sorted(counted), key=lambda text: (len(unlike[text]), -counted[text]))
    own = unlike[most]
    if own and not format.mixes:
        raise RecipeError(
            f"{next(iter(own))}: on another grid than most linears; format {format.name} has one for "
            f"all. Quantize the original with --format {format.name}"
        )
    family = family_of(model.folder)
    dtype = format.scales or model.outline(rows[0].name).scale.dtype
    departing = departures(schemes[most], own, rows)
    return WrittenModel(schemes[most], family, dtype, kept, departing, schemes=own)


def _fits(row: LinearReport, own: Scheme, scheme: Scheme) -> bool:
    """Whether a linear is stored as another scheme than its own says too: a group may be its whole row."""
    return own.weight == scheme.weight and row.tile == scheme.tile.size(row.shape)
