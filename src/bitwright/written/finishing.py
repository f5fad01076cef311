"""From the parts of a run to what its user gets: shards, what lies beside them, the account; or a format's own file."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bitwright.checkpoint.merge import merge_shards
from bitwright.checkpoint.output import OutputFolder
from bitwright.checkpoint.report_file import REPORT, as_written, without_digests
from bitwright.checkpoint.writer import write_json
from bitwright.core.errors import OutputError, UserError
from bitwright.core.format import FileFormat
from bitwright.core.json_values import plain
from bitwright.core.progress import Listener
from bitwright.core.quantized import Difference
from bitwright.formats import QuantizedFolder
from bitwright.prepare.job import Job, write_options
from bitwright.verification.engine_files import require_sound_file
from bitwright.verification.soundness import require_sound
from bitwright.written.account import run_account
from bitwright.written.companions import write_companions
from bitwright.written.sink import FolderSink

ON_THE_WAY = "folder"
"""In the work folder: the quantized folder that a file format is made of."""


def finish(job: Job, work: OutputFolder, sink: FolderSink, listener: Listener) -> dict[str, Any]:
    """Makes the result in its work folder, every part being there; what bitwright.json says of it."""
    target = job.target
    folder = work.work / ON_THE_WAY if isinstance(target, FileFormat) else work.path
    folder.mkdir(exist_ok=True)
    kept = [job.source.checkpoint.stored(name) for name in job.work.as_stored]
    merge_shards(sink.parts(), folder, job.recipe.shard_bytes, kept)
    said = write_companions(job, sink.reports(), folder)
    account: dict[str, Any] = plain(run_account(job, sink.reports(), folder) | as_written(said))
    account["verified"] = require_sound(folder, job.source.checkpoint.shapes)
    if not isinstance(target, FileFormat):
        write_json(folder / REPORT, account)
        return account
    place = work.file if target.single else work.path
    account = without_digests(account)
    told = {key: value for key, value in account.items() if key != "totals"}
    model = QuantizedFolder.open(folder)
    differences = target.write(model, place, write_options(job.recipe, told), listener)
    account["verified"] = require_sound_file(target, place, model, differences)
    account["totals"]["bytes_out"] = bytes_of(place)
    account["notes"] = [*account["notes"], *told_of(job.recipe.format, differences)]
    if not target.single:
        write_json(work.path / REPORT, account)
    return account


@contextmanager
def leaving_nothing(work: OutputFolder) -> Iterator[None]:
    """Of a file that could not be made of what was read nothing is kept: it is begun anew anyway."""
    try:
        yield
    except OutputError:
        raise
    except UserError:
        work.discard()
        raise


def told_of(format: str | None, differences: Sequence[Difference]) -> list[str]:
    """Notes on what a format quantizes by its nature, embeddings mostly, and on the linears whose codes it gave up,
    with the relative squared error."""
    also = [each for each in differences if each.fresh]
    without = [each for each in differences if not (each.fresh or each.codes)]
    ways = ((also, "quantizes {} too"), (without, "has no place for the codes of {}"))
    return [f"format {format} {_with_error(how, these)}" for these, how in ways if these]


def _with_error(how: str, differences: Sequence[Difference]) -> str:
    names, most = ", ".join(each.name for each in differences), max(each.error for each in differences)
    return f"{how.format(names)}: relative error at most {most:.3g}, squared"


def bytes_of(place: Path) -> int:
    """Of a file, or of all files in a folder."""
    files = [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files)
