"""export(): write a quantized folder in another format, its codes kept."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic

from bitwright.checkpoint.account_file import read_account, write_account
from bitwright.checkpoint.journal import Journal
from bitwright.checkpoint.merge import merge_begun, merge_shards
from bitwright.checkpoint.output import OutputFolder
from bitwright.convert.conversion import Conversion
from bitwright.convert.refusals import refuse
from bitwright.core.account import Account, ExportAccount, ExportedLinear
from bitwright.core.errors import OutputError, blaming_the_machine
from bitwright.core.format import FileFormat, TensorFormat, WriteOptions
from bitwright.core.progress import Listener, silent
from bitwright.core.quantized import Difference
from bitwright.core.recipe import SHARD_SIZE, size_in_bytes
from bitwright.formats import QuantizedFolder
from bitwright.model.fitting import require_fitting
from bitwright.model.source import find_folder
from bitwright.prepare.format_choice import refuse_idle, target
from bitwright.prepare.resources import refuse_output
from bitwright.stream.memory import peak_memory
from bitwright.stream.parts import PartWriter
from bitwright.verification.client import loads
from bitwright.verification.engine_files import require_sound_file
from bitwright.verification.findings import Check
from bitwright.verification.soundness import is_ordinary, require_sound
from bitwright.written.beside_weights import copy_along, write_allocation, write_config
from bitwright.written.finishing import leaving_nothing, not_loadable, weight_bytes_of
from bitwright.written.sink import JOURNAL, Sink


@dataclass(frozen=True)
class Exported:
    """The result of an export; sizes are in bytes, of the weight files that were read and of those that were written.

    Of ``linears``, ``exact`` compute the same weights, and ``codes_kept`` have the same codes; the rest was quantized
    again. Errors are ``|Wq - Wx|^2 / |Wq|^2`` between the weights Wq that were read and the weights Wx of the new
    format. ``also_quantized`` are the tensors, mostly embeddings, that got codes only in this format; ``also_error`` is
    the largest error among them.
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
    """Write a quantized folder, from any tool, in another format. Raises UserError.

    Weights that the format cannot hold exactly are refused unless ``lossy``. ``embeddings`` and ``base`` are for
    formats that are a file (``core.format.WriteOptions``). After a kill, the same call continues if the format is a
    folder of tensors, and begins anew if it is a file.
    """
    start, folder, output, to = monotonic(), find_folder(Path(folder)), Path(output), target(format)
    single = isinstance(to, FileFormat) and to.single
    refuse_output(folder, output, overwrite, single)
    model, shard_bytes = QuantizedFolder.open(folder), size_in_bytes(shard_size, "shard size")
    require_fitting(model.checkpoint)
    account = read_account(folder) or Account()
    along = {} if account == Account() else account.without_digests.to_json()
    options = WriteOptions(lossy, embeddings, None if base is None else Path(base), along)
    refuse_idle(format, embeddings, base, shard_size)
    refuse(model, to, options)
    place_to_work = OutputFolder.claim(output, overwrite=overwrite, restart=restart, single=single)
    with place_to_work as work, blaming_the_machine():
        if isinstance(to, FileFormat):
            place = work.file if single else work.path
            with leaving_nothing(work):
                differences = to.write(model, place, options, listener)
            verified = require_sound_file(to, place, model, differences)
        else:
            assert isinstance(to, TensorFormat)
            conversion = Conversion(model, PartWriter(work.work, to, to), lossy)
            differences = _convert(conversion, account, work, restart, shard_bytes, listener)
            verified = require_sound(work.path, _shapes(model), _client(model, work.path, to))
        bytes_out = weight_bytes_of(work.file if single else work.path)
        work.publish()
    return _summed(model, output, format, differences, bytes_out, verified, monotonic() - start)


def _convert(
    conversion: Conversion, account: Account, work: OutputFolder, restart: bool, shard_bytes: int, listener: Listener
) -> list[Difference]:
    """Make a folder of safetensors in the work folder, or go on with it; return what each linear lost."""
    model, to = conversion.model, conversion.writer.format
    identity = {"model": model.checkpoint.fingerprint(), "written": model.checkpoint.modified(), "format": to.name}
    journal = Journal.open(work.work / JOURNAL, identity, restart=restart)
    sink = Sink(work.work, journal, conversion.units)
    if not merge_begun(work.work):
        sink.take(conversion.parts(sink.files, sink.done, listener))
    merge_shards(sink.parts, work.path, shard_bytes)
    rows = [row for report in sink.reports for row in report.linears]
    written = conversion.written_model(rows)
    config = write_config(dict(model.config), to, written, work.path)
    copy_along(model.folder, work.path)
    write_allocation(written.allocation, (*model.linears, *written.kept), work.path)
    linears = tuple(ExportedLinear(row.name, row.codes_kept, row.weight_error, row.digest) for row in rows)
    schemes = [replace(row, scheme=str(written.allocation.scheme(row.name))) for row in rows]
    exported = replace(
        account.stored_as(str(written.scheme), schemes, weight_bytes_of(work.path)),
        format=to.name,
        export=ExportAccount(model.format_name, linears),
        quantization_config=config,
    )
    write_account(work.path, exported)
    return [Difference(row.name, row.codes_kept, row.weight_error) for row in rows]


def _client(model: QuantizedFolder, written: Path, to: TensorFormat) -> Check | None:
    """Whether a new folder loads; None if config.json and weights are ordinary. Raises OutputError if it does not."""
    if is_ordinary(written):
        return None
    client = loads(written, model.checkpoint)
    if client.passed is False:
        raise OutputError(not_loadable(to, client))
    return client


def _shapes(model: QuantizedFolder) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors as a model in full precision has them, by name."""
    linears = {f"{linear}.weight": model.shape(linear) for linear in model.linears}
    return {name: model.shape(name) for name in model.passed} | linears


def _summed(
    model: QuantizedFolder,
    output: Path,
    format: str,
    differences: Sequence[Difference],
    bytes_out: int,
    verified: str,
    seconds: float,
) -> Exported:
    lost, also = ([linear for linear in differences if linear.fresh is fresh] for fresh in (False, True))
    worst = max(lost, key=lambda linear: linear.error, default=None)
    return Exported(
        folder=str(model.folder),
        output=str(output),
        read_as=model.format_name,
        format=format,
        linears=len(lost),
        exact=sum(linear.codes and linear.error == 0 for linear in lost),
        codes_kept=sum(linear.codes for linear in lost),
        largest_error=0.0 if worst is None else worst.error,
        largest_in=worst.name if worst is not None and worst.error else None,
        mean_error=sum(linear.error for linear in lost) / max(1, len(lost)),
        also_quantized=tuple(tensor.name for tensor in also),
        also_error=max((tensor.error for tensor in also), default=0.0),
        bytes_in=sum(path.stat().st_size for path in model.checkpoint.files),
        bytes_out=bytes_out,
        verified=verified,
        seconds=seconds,
        peak_bytes=peak_memory(),
    )
