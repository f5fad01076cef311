"""export(): a quantized folder in another format, its codes kept."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bitwright.api.companions import copy_companions, write_config
from bitwright.api.engine_files import require_sound_file
from bitwright.api.finishing import bytes_of
from bitwright.api.format_choice import is_file_format, target
from bitwright.api.model_view import ModelView
from bitwright.api.places import refuse_output
from bitwright.api.quantizing import JOURNAL
from bitwright.api.refitting import refitted
from bitwright.api.report_file import REPORT, account_of
from bitwright.api.soundness import require_sound
from bitwright.api.source import family_of
from bitwright.checkpoint.journal import Journal
from bitwright.checkpoint.merge import merge_begun, merge_shards
from bitwright.checkpoint.output import OutputFolder
from bitwright.checkpoint.ranges import Stored
from bitwright.checkpoint.writer import write_json, write_tensors
from bitwright.core.convert import relative_error
from bitwright.core.errors import RecipeError
from bitwright.core.progress import Listener, Progress, silent
from bitwright.core.qtensor import QTensor
from bitwright.core.quantized import Difference, WriteOptions, WrittenModel, departures
from bitwright.core.recipe import size_in_bytes
from bitwright.core.scheme import Grid, Scheme, Tile
from bitwright.formats import QuantizedFolder
from bitwright.report.plain import plain
from bitwright.stream.memory import peak_memory
from bitwright.stream.units import block_of

OUTSIDE = "outside of the blocks"


@dataclass(frozen=True)
class Exported:
    """What ``export`` made. Sizes in bytes.

    Of ``linears``, ``exact`` compute the same weights, ``codes_kept`` have the same codes; the rest was quantized once
    more. Errors are ``|Wq - Wx|^2 / |Wq|^2`` between the weights that were read and those of the new format.
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
    shard_size: str = "5GB",
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
    single = is_file_format(to) and bool(to.SINGLE)
    refuse_output(folder, output, overwrite, single)
    model, shard_bytes = QuantizedFolder.open(folder), size_in_bytes(shard_size, "shard size")
    options = WriteOptions(lossy, embeddings, None if base is None else Path(base), account_of(folder))
    _refuse(model, format, to, options)
    with OutputFolder.claim(output, overwrite=overwrite, restart=restart, single=single) as work:
        if is_file_format(to):
            place = work.file if single else work.path
            differences = to.write(model, place, options, listener)
            verified = require_sound_file(to, place, model, differences)
        else:
            differences = _TensorExport(model, to, format, lossy, work, restart).run(shard_bytes, listener)
            verified = require_sound(work.path, _names(model))
        bytes_out = bytes_of(work.file if single else work.path)
        work.publish()
    return _summed(model, output, format, differences, bytes_out, verified, monotonic() - start)


def _refuse(model: QuantizedFolder, format: str, to: ModuleType, options: WriteOptions) -> None:
    """Refuses, before the work, what can be told beforehand."""
    if is_file_format(to):
        to.check(model.checkpoint.config, model.folder, options)
        return
    for name, value in (("embeddings", options.embeddings), ("base", options.base)):
        if value is not None:
            raise RecipeError(f"format {format} has no use for --{name}; leave it out")
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


class _TensorExport:
    """A folder of safetensors: part by part, a block each, noted in a journal, and merged."""

    def __init__(
        self, model: QuantizedFolder, to: ModuleType, name: str, lossy: bool, work: OutputFolder, restart: bool
    ) -> None:
        self.model, self.to, self.name, self.lossy, self.work = model, to, name, lossy, work
        identity = {"model": model.checkpoint.fingerprint(), "format": name}
        self.journal = Journal.open(work.work / JOURNAL, identity, restart=restart)
        self.units = _units(model)
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
            weight, lost = refitted(name, read := self.model.read(name), self.to, self.lossy)
            tensors |= (made := self.to.encode(name, weight))
            if not hasattr(self.to, "described"):  # what is stored are no codes but the weights, rounded to their dtype
                stored = self.to.decode(made, name, weight.grid).float()
                lost = replace(lost, error=relative_error(read.dequantize(torch.float32), stored))
            rows.append(asdict(lost) | _terms(weight))
        write_tensors(self.work.work / self.files[unit], tensors)
        self.journal.record(unit, self.files[unit], {"linears": rows})

    def _write_companions(self, rows: Sequence[Mapping[str, Any]]) -> None:
        write_config(dict(self.model.config), self.to, self._written(rows), self.work.path)
        copy_companions(self.model.folder, self.work.path)
        account = account_of(self.model.folder)
        linears = [{key: row[key] for key in ("name", "codes", "error")} for row in rows]
        lost = {"read_as": self.model.format_name, "linears": linears}
        write_json(self.work.path / REPORT, plain(account | {"format": self.name, "export": lost}))

    def _written(self, rows: Sequence[Mapping[str, Any]]) -> WrittenModel:
        """What config.json has to say: the terms that most linears share are the scheme's, the others depart."""
        described = self.model.described
        assert described is not None
        terms = [(row["bits"], row["symmetric"], *row["group"]) for row in rows]
        bits, symmetric, out, in_ = max(sorted(set(terms)), key=terms.count)
        scheme = Scheme(
            Grid(bits, symmetric),
            Tile(out, in_),
            activation_bits=None if described.activations is None else described.activations.bits,
            kv_bits=None if described.kv is None else described.kv.bits,
        )
        unlike = [row["name"] for row in rows if (row["bits"], row["symmetric"]) != (bits, symmetric)]
        if unlike:
            raise RecipeError(f"{unlike[0]}: on another grid than most linears; format {self.name} has one for all")
        family, head_dim = family_of(self.model.folder)
        dtype: torch.dtype = getattr(torch, rows[0]["dtype"])
        return WrittenModel(scheme, family, head_dim, dtype, _kept(self.model), departures(scheme, rows))


def _kept(model: QuantizedFolder) -> tuple[str, ...]:
    """The linears that are not quantized, by their names in the model as transformers sees it, else as they were said
    to be: not every format names all of them."""
    quantized = {f"{linear}.weight" for linear in model.linears}
    view = ModelView.of(model.checkpoint, (*model.passed, *quantized))
    if view is None:
        said = () if model.described is None else model.described.kept
        return tuple(sorted({*said, "lm_head"} - set(model.linears)))
    return tuple(sorted(view.linears - {view.linear(name) for name in quantized}))


def _names(model: QuantizedFolder) -> list[str]:
    """What all tensors together are called where nothing is quantized."""
    return [*model.passed, *(f"{linear}.weight" for linear in model.linears)]


def _units(model: QuantizedFolder) -> dict[str, tuple[list[str], list[str]]]:
    """Linears and other tensors by the block that they are in."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    for kind, names in enumerate((model.linears, model.passed)):
        for name in names:
            found.setdefault(block_of(name) or OUTSIDE, ([], []))[kind].append(name)
    return found


def _terms(weight: QTensor) -> dict[str, Any]:
    """What config.json may have to say of a linear."""
    return {
        "bits": weight.grid.bits,
        "symmetric": weight.grid.symmetric,
        "group": [weight.tile.out, weight.tile.in_],
        "shape": list(weight.shape),
        "tile": list(weight.tile.size(weight.shape)),
        "outliers": 0 if weight.outlier_index is None else weight.outlier_index.numel(),
        "dtype": str(weight.scale.dtype).removeprefix("torch."),
    }


def _summed(
    model: QuantizedFolder,
    output: Path,
    format: str,
    lost: Sequence[Difference],
    bytes_out: int,
    verified: str,
    seconds: float,
) -> Exported:
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
        bytes_in=model.checkpoint.total_bytes,
        bytes_out=bytes_out,
        verified=verified,
        seconds=seconds,
        peak_bytes=peak_memory(),
    )
