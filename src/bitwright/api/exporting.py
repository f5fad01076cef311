"""export(): a quantized folder in another format, its codes kept."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from bitwright.api.quantizing import JOURNAL
from bitwright.checkpoint.journal import Journal
from bitwright.checkpoint.merge import merge_begun, merge_shards
from bitwright.checkpoint.output import OutputFolder
from bitwright.checkpoint.ranges import Stored
from bitwright.checkpoint.report_file import REPORT, account_of, as_written, without_digests
from bitwright.checkpoint.writer import write_json, write_tensors
from bitwright.convert.exported_terms import (
    common_columns,
    kept_linears,
    refuse_activations,
    refuse_departures,
    refuse_terms,
    terms_of,
    written_model,
)
from bitwright.convert.refitting import refitted
from bitwright.core.convert import relative_error
from bitwright.core.errors import RecipeError
from bitwright.core.format import FileFormat, Foreseen, Format, TensorFormat, WriteOptions, typical
from bitwright.core.json_values import plain
from bitwright.core.progress import Listener, Progress, silent
from bitwright.core.quantized import Difference
from bitwright.core.recipe import SHARD_SIZE, size_in_bytes
from bitwright.core.tensor_bytes import digest
from bitwright.formats import QuantizedFolder
from bitwright.prepare.format_choice import refuse_idle, target
from bitwright.prepare.places import refuse_output
from bitwright.stream.memory import peak_memory
from bitwright.stream.units import block_of
from bitwright.verification.completeness import require_all_tensors, require_sound_headers
from bitwright.verification.engine_files import require_sound_file
from bitwright.verification.soundness import require_sound
from bitwright.written.companions import copy_companions, write_config
from bitwright.written.finishing import bytes_of, leaving_nothing

OUTSIDE = "outside of the blocks"
KEPT = ("name", "codes", "error", "digest")
"""What bitwright.json keeps of the account of a linear."""


@dataclass(frozen=True)
class Exported:
    """What ``export`` made. Sizes in bytes.

    Of ``linears``, ``exact`` compute the same weights, ``codes_kept`` have the same codes; the rest was quantized once
    more. Errors are ``|Wq - Wx|^2 / |Wq|^2`` between the weights that were read and those of the new format.
    ``also_quantized`` are the tensors that had no codes and have some in this format, embeddings mostly, and
    ``also_error`` the largest error among them.
    """

    folder: str
    output: str
    read_as: str
    format: str
    linears: int
    exact: int
    codes_kept: int
    largest_error: float
    largest_in: str | None
    mean_error: float
    also_quantized: tuple[str, ...]
    also_error: float
    bytes_in: int
    bytes_out: int
    verified: str
    seconds: float
    peak_bytes: int


def export(
    folder: Path | str,
    output: Path | str,
    *,
    format: str,
    lossy: bool = False,
    embeddings: str | None = None,
    base: Path | str | None = None,
    shard_size: str = SHARD_SIZE,
    overwrite: bool = False,
    restart: bool = False,
    listener: Listener = silent,
) -> Exported:
    """Writes a quantized folder, whoever quantized it, in another format. Raises UserError.

    Weights that the format cannot hold exactly are refused unless ``lossy``. ``embeddings`` and ``base`` are for
    formats that are a file (``core.quantized.WriteOptions``). Killed, the same call
    continues where the format is a folder of tensors, and begins anew where it is a file.
    """
    start, folder, output, to = monotonic(), Path(folder), Path(output), target(format)
    single = isinstance(to, FileFormat) and to.single
    refuse_output(folder, output, overwrite, single)
    model, shard_bytes = QuantizedFolder.open(folder), size_in_bytes(shard_size, "shard size")
    account = without_digests(account_of(folder))
    options = WriteOptions(lossy, embeddings, None if base is None else Path(base), account)
    refuse_idle(format, embeddings, base, shard_size)
    _refuse(model, format, to, options)
    with OutputFolder.claim(output, overwrite=overwrite, restart=restart, single=single) as work:
        if isinstance(to, FileFormat):
            place = work.file if single else work.path
            with leaving_nothing(work):
                differences = to.write(model, place, options, listener)
            verified = require_sound_file(to, place, model, differences)
        else:
            assert isinstance(to, TensorFormat)
            differences = _TensorExport(model, to, format, lossy, work, restart).run(shard_bytes, listener)
            verified = require_sound(work.path, _shapes(model))
        bytes_out = bytes_of(work.file if single else work.path)
        work.publish()
    return _summed(model, output, format, differences, bytes_out, verified, monotonic() - start)


def _refuse(model: QuantizedFolder, format: str, to: Format, options: WriteOptions) -> None:
    """Refuses, before the work, what can be told beforehand."""
    refuse_activations(model, to)
    if model.described is not None and not options.lossy:
        refuse_departures(model, to)
    require_sound_headers(model)
    if isinstance(to, FileFormat):
        to.check(model.checkpoint.config, model.folder, options, _foreseen(model))
        return
    if model.format is None:
        raise RecipeError(
            f"{model.folder} is not quantized: bitwright quantize {model.folder} --format {format} does that"
        )
    if model.stacks:
        raise RecipeError(
            f"{model.stacks[0]} in {model.folder} is fused over experts, and such weights are not exported; quantize "
            f"the original with --format {format}"
        )
    if model.format_name == format:
        raise RecipeError(f"{model.folder} is a {format} folder already; name another format")
    require_all_tensors(model)
    for name in model.linears:
        to.check_shape(name, model.shape(name))
    assert isinstance(to, TensorFormat)
    refuse_terms(model, format, to, options.lossy)


def _foreseen(model: QuantizedFolder) -> Foreseen:
    first = model.read(typical(model)) if model.linears else None
    grid, tile = (None, None) if first is None else (first.grid, first.tile)
    return Foreseen({name: model.shape(name) for name in model.linears}, model.passed, grid, tile)


class _TensorExport:
    """A folder of safetensors: part by part, a block each, noted in a journal, and merged."""

    def __init__(
        self, model: QuantizedFolder, to: TensorFormat, name: str, lossy: bool, work: OutputFolder, restart: bool
    ) -> None:
        self.model, self.to, self.name, self.lossy, self.work = model, to, name, lossy, work
        checkpoint = model.checkpoint
        identity = {"model": checkpoint.fingerprint(), "written": checkpoint.modified(), "format": name}
        self.journal = Journal.open(work.work / JOURNAL, identity, restart=restart)
        self.units, self.common = _units(model), common_columns(model)
        self.files = {unit: f"part-{n:05d}.safetensors" for n, unit in enumerate(self.units)}

    def run(self, shard_bytes: int, listener: Listener) -> list[Difference]:
        """Everything in the work folder's result; what each linear lost."""
        if not merge_begun(self.work.work):
            for done, unit in enumerate(self.units):
                listener(Progress("export", done, len(self.units), unit, peak_memory()))
                if unit not in self.journal.done:
                    self._write(unit)
            listener(Progress("export", len(self.units), len(self.units), "all parts", peak_memory()))
        merge_shards([self.work.work / file for file in self.files.values()], self.work.path, shard_bytes)
        rows = [row for unit in self.units for row in self.journal.recorded[unit]["report"]["linears"]]
        self._write_companions(rows)
        return [Difference(row["name"], row["codes"], row["error"]) for row in rows]

    def _write(self, unit: str) -> None:
        linears, passed = self.units[unit]
        tensors: dict[str, Tensor | Stored] = {name: self.model.checkpoint.stored(name) for name in passed}
        rows: list[dict[str, Any]] = []
        for name in linears:
            weight, lost = refitted(name, read := self.model.read(name), self.to, self.lossy, self.common)
            tensors |= (made := self.to.encode(name, weight))
            if self.to.reader is None:  # what is stored are no codes but the weights, rounded to their dtype
                stored = self.to.decode(made, name, weight.grid).float()
                lost = replace(lost, error=relative_error(read.dequantize(torch.float32), stored))
            rows.append(asdict(lost) | terms_of(weight) | {"digest": digest(made)})
        write_tensors(self.work.work / self.files[unit], tensors)
        self.journal.record(unit, self.files[unit], {"linears": rows})

    def _write_companions(self, rows: Sequence[Mapping[str, Any]]) -> None:
        written = written_model(self.model, self.name, rows, kept_linears(self.model))
        said = write_config(dict(self.model.config), self.to, written, self.work.path)
        copy_companions(self.model.folder, self.work.path)
        account = without_digests(account_of(self.model.folder))
        linears = [{key: row[key] for key in KEPT if key in row} for row in rows]
        lost = {"read_as": self.model.format_name, "linears": linears}
        account |= {"format": self.name, "export": lost, **as_written(said)}
        write_json(self.work.path / REPORT, plain(account))


def _shapes(model: QuantizedFolder) -> dict[str, tuple[int, ...]]:
    """All tensors as they are called, with the shapes that they have, where nothing is quantized."""
    linears = {f"{linear}.weight": model.shape(linear) for linear in model.linears}
    return {name: model.shape(name) for name in model.passed} | linears


def _units(model: QuantizedFolder) -> dict[str, tuple[list[str], list[str]]]:
    """Linears and other tensors by the block that they are in."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    for kind, names in enumerate((model.linears, model.passed)):
        for name in names:
            found.setdefault(block_of(name) or OUTSIDE, ([], []))[kind].append(name)
    return found


def _summed(
    model: QuantizedFolder,
    output: Path,
    format: str,
    differences: Sequence[Difference],
    bytes_out: int,
    verified: str,
    seconds: float,
) -> Exported:
    lost, also = ([each for each in differences if each.fresh is fresh] for fresh in (False, True))
    worst = max(lost, key=lambda one: one.error, default=None)
    return Exported(
        folder=str(model.folder),
        output=str(output),
        read_as=model.format_name,
        format=format,
        linears=len(lost),
        exact=sum(one.codes and one.error == 0 for one in lost),
        codes_kept=sum(one.codes for one in lost),
        largest_error=0.0 if worst is None else worst.error,
        largest_in=worst.name if worst is not None and worst.error else None,
        mean_error=sum(one.error for one in lost) / max(1, len(lost)),
        also_quantized=tuple(each.name for each in also),
        also_error=max((each.error for each in also), default=0.0),
        bytes_in=model.checkpoint.total_bytes,
        bytes_out=bytes_out,
        verified=verified,
        seconds=seconds,
        peak_bytes=peak_memory(),
    )
