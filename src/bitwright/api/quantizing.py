"""quantize(): a model folder in, a smaller model folder out."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any

from bitwright.api.account import identity
from bitwright.api.block_work import BlockWork
from bitwright.api.crew import Crew, crew_of
from bitwright.api.engine_choice import for_engines
from bitwright.api.finishing import finish
from bitwright.api.format_choice import is_file_format, is_single
from bitwright.api.job import Job, prepare
from bitwright.api.parameters import saved_for
from bitwright.api.planning import plan_of
from bitwright.api.sink import FolderSink
from bitwright.api.source import require_folder
from bitwright.api.tensor_run import run_tensors
from bitwright.api.tensor_work import TensorWork
from bitwright.checkpoint.journal import Journal
from bitwright.checkpoint.merge import merge_begun
from bitwright.checkpoint.output import OutputFolder, refuse_existing, refuse_overlap, require_free, work_folder
from bitwright.checkpoint.writer import write_json, write_tensors
from bitwright.core.errors import ChangedError, OutputError, RecipeError
from bitwright.core.progress import Listener, Progress, silent
from bitwright.core.recipe import Recipe
from bitwright.methods import learned
from bitwright.stream.hands import Hands
from bitwright.stream.memory import peak_memory
from bitwright.stream.ranks import Ranks
from bitwright.stream.runner import RunPlan, run

TIMINGS, JOURNAL, OTHER_JOURNALS = "bitwright-timings.json", "journal.jsonl", "journal-*.jsonl"


@dataclass(frozen=True)
class Result:
    """What ``quantize`` made. Sizes in bytes; ``bits_per_weight`` is over the quantized linears, all counted.

    ``per_ic`` linears have their groups along the output; ``outliers`` weights are kept exactly; ``verified`` is what
    was found when the folder was read back.
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
    verified: str
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
    workers: int | None = None,
    max_memory: str | None = None,
    hands: Hands | None = None,
    listener: Listener = silent,
) -> Result:
    """Runs a recipe and writes a folder that its format's clients load. Raises UserError.

    Works in ``OUTPUT.partial`` and renames it at the end, so an output that exists is complete. Killed at any
    moment, the same call continues; a changed recipe is refused unless ``restart``. ``workers`` and ``max_memory``
    ("2GB", of all processes together) are for methods without text, which share tensors out between processes, under
    torchrun on several machines; the bytes are the same. ``hands`` are workers that have been started already.
    """
    start, output, ranks = monotonic(), Path(output), Ranks.here()
    recipe = for_engines(recipe)
    single = is_single(recipe.format)
    refuse_output(Path(recipe.model), output, overwrite, single)
    job = prepare(recipe, device)
    crew = replace(crew_of(job, workers, max_memory, ranks), hands=hands or Hands())
    if not ranks.first:
        return _help(job, output, crew, ranks)
    saved = None if save_parameters is None else _place_to_save(job, Path(save_parameters), output)
    _require_free(job, output)
    if not isinstance(job.work, TensorWork):  # hours follow; where minutes do, each tensor is checked when it is read
        checkpoint = job.source.checkpoint
        checkpoint.check_finite(lambda done, total: listener(Progress("check", done, total, "bytes", peak_memory())))
    with OutputFolder.claim(output, overwrite=overwrite, restart=restart, single=single) as work:
        journal = Journal.open(work.work / JOURNAL, identity(job), restart=restart)
        _adopt_others(journal)
        resumed = len(journal.recorded)
        sink = FolderSink(work.work, journal, job)
        with _forgetting_what_changed(work.work):
            account, beside = _produce(job, work, sink, saved, crew, ranks, listener)
        seconds, peak = monotonic() - start, peak_memory() + beside
        if not single:
            write_json(work.path / TIMINGS, {"seconds": seconds, "peak_bytes": peak, "resumed_units": resumed})
        work.publish()
    return ranks.from_first(_result(job, output, account, seconds, peak, resumed))


def speaks() -> bool:
    """Whether this process is the one to say what came of it: of those that torchrun starts, the first."""
    return Ranks.here().first


def _help(job: Job, output: Path, crew: Crew, ranks: Ranks) -> Result:
    """What every process but the first does: its share, noted in a journal of its own that the first takes over."""
    ranks.wait_for_all()  # the first has the folder
    work = work_folder(output.resolve())
    journal = Journal.open(work / f"journal-{ranks.index}.jsonl", identity(job), restart=True)
    with _forgetting_what_changed(work):
        run_tensors(job, FolderSink(work, journal, job), crew, ranks, silent)
    ranks.wait_for_all()
    return ranks.from_first(None)


@contextmanager
def _forgetting_what_changed(work: Path) -> Iterator[None]:
    """Removes every journal where the checkpoint changed under the run: the parts may be of two models."""
    try:
        yield
    except ChangedError:
        for journal in (work / JOURNAL, *work.glob(OTHER_JOURNALS)):
            journal.unlink(missing_ok=True)
        raise


def _adopt_others(journal: Journal) -> None:
    for other in sorted(journal.path.parent.glob(OTHER_JOURNALS)):
        journal.adopt(other)


def _produce(
    job: Job,
    work: OutputFolder,
    sink: FolderSink,
    saved: Path | None,
    crew: Crew,
    ranks: Ranks,
    listener: Listener,
) -> tuple[dict[str, Any], int]:
    """Everything that becomes the output, in the work folder; what bitwright.json says, and the peak bytes of worker
    processes."""
    beside = 0
    ranks.wait_for_all()
    if not merge_begun(work.work):
        beside = _write_tensors(job, sink, crew, ranks, listener)
    elif ranks.count > 1:
        run_tensors(job, sink, crew, ranks, listener)  # nothing is left to do, for the others neither
    ranks.wait_for_all()
    _adopt_others(sink.journal)
    if saved is not None:
        write_tensors(saved, sink.learned(), job.belonging)
    return finish(job, work, sink, listener), beside


def _result(job: Job, output: Path, account: dict[str, Any], seconds: float, peak: int, resumed: int) -> Result:
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
        verified=account["verified"],
        peak_bytes=peak,
        resumed=resumed,
        notes=tuple(dict.fromkeys((*plan_of(job).notes, *account["notes"]))),
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


def refuse_output(model: Path, output: Path, overwrite: bool, single: bool = False) -> None:
    """Refuses what can be told of an output, a folder or a ``single`` file, from its path alone, before anything is
    read. Raises OutputError."""
    require_folder(model)
    try:
        refuse_overlap(model, output)
        refuse_existing(output, overwrite, single)
        work_folder(output.resolve()).exists()  # its name is longer: perhaps too long
        around = next(folder for folder in output.resolve().parents if folder.exists())
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, links that go round in a circle
        raise OutputError(f"{output}: cannot be written: {error}; choose another output") from None
    if not (around.is_dir() and os.access(around, os.W_OK | os.X_OK)):
        found = "may not be written to" if around.is_dir() else "is a file"
        raise OutputError(f"{output}: cannot be made: {around} {found}; check permissions, or choose another output")


def _require_free(job: Job, output: Path) -> None:
    """Refuses a disk too small for all parts and one shard beside them, less what an earlier run has written."""
    total = plan_of(job).bytes_out * (2 if is_file_format(job.target) else 1)  # the folder that it is made of
    written = sum(path.stat().st_size for path in work_folder(output.resolve()).rglob("*.safetensors"))
    require_free(output, max(0, total + min(total, job.recipe.shard_bytes) - written))


def _write_tensors(job: Job, sink: FolderSink, crew: Crew, ranks: Ranks, listener: Listener) -> int:
    """Every part that is not there yet; the peak bytes of worker processes."""
    if isinstance(job.work, TensorWork):
        return run_tensors(job, sink, crew, ranks, listener)
    assert isinstance(job.work, BlockWork)
    for name in job.work.outside:
        sink.pass_through(name)
    head, trained = job.recipe.quantize_lm_head, job.arithmetic
    plan = RunPlan(job.scheme, job.methods, job.settings, job.scales, head, job.learned, trained)
    run(job.work.skeleton, plan, sink, tokens=job.tokens, listener=listener)
    return 0
