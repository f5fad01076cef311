"""quantize(): a model folder in, a smaller model folder out."""

import os
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from bitwright.api.account import identity, run_account
from bitwright.api.companions import write_companions
from bitwright.api.job import Job, prepare
from bitwright.api.loading import REPORT
from bitwright.api.parameters import saved_for
from bitwright.api.planning import plan_of
from bitwright.api.sink import FolderSink
from bitwright.api.source import require_folder
from bitwright.checkpoint.journal import Journal
from bitwright.checkpoint.merge import merge_begun, merge_shards
from bitwright.checkpoint.output import OutputFolder, refuse_existing, refuse_overlap, require_free, work_folder
from bitwright.checkpoint.writer import write_json, write_tensors
from bitwright.core.errors import OutputError, RecipeError
from bitwright.core.progress import Listener, Progress, silent
from bitwright.core.recipe import Recipe
from bitwright.methods import learned
from bitwright.report.plain import plain
from bitwright.stream.budget import peak_memory
from bitwright.stream.runner import RunPlan, run

TIMINGS, JOURNAL = "bitwright-timings.json", "journal.jsonl"


@dataclass(frozen=True)
class Result:
    """What ``quantize`` made. Sizes in bytes; ``bits_per_weight`` is over the quantized linears, all counted.

    ``per_ic`` linears have their groups along the output; ``outliers`` weights are kept exactly.
    """

    output: str
    scheme: str
    method: str
    format: str
    linears: int
    per_ic: int
    outliers: int
    bits_per_weight: float
    bytes_in: int
    bytes_out: int
    output_error: float | None
    seconds: float
    peak_bytes: int
    resumed: int
    notes: tuple[str, ...]
    fallbacks: tuple[str, ...]


def quantize(
    recipe: Recipe,
    output: Path | str,
    *,
    overwrite: bool = False,
    restart: bool = False,
    save_parameters: Path | str | None = None,
    device: str = "auto",
    listener: Listener = silent,
) -> Result:
    """Runs a recipe and writes a folder that its format's clients load. Raises UserError.

    Works in ``OUTPUT.partial`` and renames it at the end, so an output that exists is complete. Killed at any
    moment, the same call continues; a changed recipe is refused unless ``restart``.
    """
    start, output = monotonic(), Path(output)
    refuse_output(Path(recipe.model), output, overwrite)
    job = prepare(recipe, device)
    saved = None if save_parameters is None else _place_to_save(job, Path(save_parameters), output)
    _require_free(job, output)
    checkpoint = job.source.checkpoint
    checkpoint.check_finite(lambda done, total: listener(Progress("check", done, total, "bytes", peak_memory())))
    with OutputFolder.claim(output, overwrite=overwrite, restart=restart) as work:
        journal = Journal.open(work.work / JOURNAL, identity(job), restart=restart)
        resumed = len(journal.recorded)
        account = _produce(job, work, FolderSink(work.work, journal, job), saved, listener)
        seconds = monotonic() - start
        write_json(work.path / TIMINGS, {"seconds": seconds, "peak_bytes": peak_memory(), "resumed_units": resumed})
        work.publish()
    return _result(job, output, account, seconds, resumed)


def _produce(job: Job, work: OutputFolder, sink: FolderSink, saved: Path | None, listener: Listener) -> dict[str, Any]:
    """Everything that becomes the output, in the work folder; returns what bitwright.json says."""
    if not merge_begun(work.work):
        _write_tensors(job, sink, listener)
    merge_shards(sink.parts(), work.path, job.recipe.shard_bytes)
    write_companions(job, sink.reports(), work.path)
    if saved is not None:
        write_tensors(saved, sink.learned(), job.belonging)
    account: dict[str, Any] = plain(run_account(job, sink.reports(), work.path))
    write_json(work.path / REPORT, account)
    return account


def _result(job: Job, output: Path, account: dict[str, Any], seconds: float, resumed: int) -> Result:
    totals = account["totals"]
    errors = [block["output_error"] for block in account["blocks"] if block["output_error"] is not None]
    return Result(
        output=str(output),
        scheme=str(job.scheme),
        method=job.method,
        format=account["format"],
        linears=totals["linears"],
        per_ic=totals["per_ic"],
        outliers=totals["outliers"],
        bits_per_weight=totals["bits_per_weight"],
        bytes_in=totals["bytes_in"],
        bytes_out=totals["bytes_out"],
        output_error=errors[-1] if errors else None,
        seconds=seconds,
        peak_bytes=peak_memory(),
        resumed=resumed,
        notes=plan_of(job).notes,
        fallbacks=tuple(account["fallbacks"]),
    )


def _place_to_save(job: Job, path: Path, output: Path) -> Path:
    """Refuses, before hours of training, a place where nothing can be saved, or a method with nothing to save.

    A file that this very run wrote before it was killed is no obstacle.
    """
    if not learned(job.methods):
        raise RecipeError(f"{job.method} learns nothing, so --save-parameters {path} would stay empty; leave it out")
    if work_folder(output.resolve()).exists() and saved_for(path) == job.belonging:
        return path
    if path.exists() or not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        found = "exists" if path.exists() else f"cannot be made: {path.absolute().parent} is no folder to write to"
        raise OutputError(f"--save-parameters {path} {found}; name a new file in a folder that is there")
    return path


def refuse_output(model: Path, output: Path, overwrite: bool) -> None:
    """Refuses what can be told of an output from its path alone, before anything is read. Raises OutputError."""
    require_folder(model)
    try:
        refuse_overlap(model, output)
        refuse_existing(output, overwrite)
        work_folder(output.resolve()).exists()  # its name is longer: perhaps too long
        around = next(folder for folder in output.resolve().parents if folder.exists())
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, links that go round in a circle
        raise OutputError(f"{output}: cannot be written: {error}; choose another output") from None
    if not (around.is_dir() and os.access(around, os.W_OK | os.X_OK)):
        found = "may not be written to" if around.is_dir() else "is a file"
        raise OutputError(f"{output}: cannot be made: {around} {found}; check permissions, or choose another output")


def _require_free(job: Job, output: Path) -> None:
    """Refuses a disk too small for all parts and one shard beside them, less what an earlier run has written."""
    total = plan_of(job).bytes_out
    written = sum(path.stat().st_size for path in work_folder(output.resolve()).rglob("*.safetensors"))
    require_free(output, max(0, total + min(total, job.recipe.shard_bytes) - written))


def _write_tensors(job: Job, sink: FolderSink, listener: Listener) -> None:
    for name in job.outside():
        sink.pass_through(name)
    plan = RunPlan(job.scheme, job.methods, job.settings, job.recipe.quantize_lm_head, job.learned)
    run(job.skeleton, plan, sink, tokens=job.tokens, listener=listener)
