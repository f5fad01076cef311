"""quantize(): a model folder in, a smaller model folder out."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any

from bitwright.checkpoint.journal import Journal
from bitwright.checkpoint.merge import merge_begun
from bitwright.checkpoint.output import OutputFolder, begin_anew, work_folder
from bitwright.checkpoint.writer import write_json, write_tensors
from bitwright.core.errors import ChangedError
from bitwright.core.progress import Listener, Progress, silent
from bitwright.core.recipe import Recipe
from bitwright.prepare.block_work import BlockWork
from bitwright.prepare.crew import Crew, crew_of
from bitwright.prepare.engine_choice import for_engines
from bitwright.prepare.format_choice import is_single
from bitwright.prepare.job import Job, prepare
from bitwright.prepare.places import place_to_save, refuse_output, require_room
from bitwright.prepare.plan import plan_of
from bitwright.prepare.tensor_work import TensorWork
from bitwright.stream.memory import peak_memory
from bitwright.stream.ranks import Ranks
from bitwright.stream.runner import RunPlan, run
from bitwright.stream.worker_pool import WorkerPool
from bitwright.written.account import WRITTEN, identity
from bitwright.written.finishing import finish
from bitwright.written.sink import FolderSink
from bitwright.written.tensor_run import run_tensors

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
    pool: WorkerPool | None = None,
    listener: Listener = silent,
) -> Result:
    """Runs a recipe and writes a folder that its format's clients load. Raises UserError.

    Works in ``OUTPUT.partial`` and renames it at the end, so an output that exists is complete. Killed at any
    moment, the same call continues; a changed recipe is refused unless ``restart``. ``workers`` and ``max_memory``
    ("2GB", of all processes together) are for methods without text, which share tensors out between processes, under
    torchrun on several machines; the bytes are the same. ``pool`` holds worker processes that are started already.
    """
    start, output, ranks = monotonic(), Path(output), Ranks.here()
    with ranks.alike():
        recipe = for_engines(recipe, device)
        single = is_single(recipe.format)
        refuse_output(Path(recipe.model), output, overwrite, single)
        job = prepare(recipe, device)
        crew = replace(crew_of(job, workers, max_memory, ranks), pool=pool or WorkerPool())
    if not ranks.first:
        return _help(job, output, crew, ranks)
    saved = None if save_parameters is None else place_to_save(job, Path(save_parameters), output)
    require_room(job, output)
    _require_finite(job, listener)
    with OutputFolder.claim(output, overwrite=overwrite, restart=restart, single=single) as work:
        account, timings = _in_folder(job, work, saved, crew, ranks, restart, start, listener)
        if not single:
            write_json(work.path / TIMINGS, timings)
        work.publish()
    return ranks.from_first(_result(job, output, account, timings))


def speaks() -> bool:
    """Whether this process is the one to say what came of it: of those that torchrun starts, the first."""
    return Ranks.here().first


def _require_finite(job: Job, listener: Listener) -> None:
    """Looks for NaN beforehand where hours follow; where minutes do, each tensor is checked when it is read."""
    if not isinstance(job.work, TensorWork):
        checkpoint = job.source.checkpoint
        checkpoint.check_finite(lambda done, total: listener(Progress("check", done, total, "bytes", peak_memory())))


def _in_folder(
    job: Job,
    work: OutputFolder,
    saved: Path | None,
    crew: Crew,
    ranks: Ranks,
    restart: bool,
    start: float,
    listener: Listener,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The run itself, or what an earlier one left of it; what bitwright.json says, and what differs from run to run."""
    journal = Journal.open(work.work / JOURNAL, identity(job), restart=restart)
    _adopt_others(journal)
    resumed = len(journal.recorded)
    with _forgetting_what_changed(work.work):
        account, beside = _produce(job, work, FolderSink(work.work, journal, job), saved, crew, ranks, listener)
    peak = peak_memory() + beside
    return account, {"seconds": monotonic() - start, "peak_bytes": peak, "resumed_units": resumed}


def _help(job: Job, output: Path, crew: Crew, ranks: Ranks) -> Result:
    """What every process but the first does: its share, noted in a journal of its own that the first takes over."""
    written: dict[str, str] = ranks.from_first(None)  # of the same files elsewhere; it has the folder by now
    work = work_folder(output.resolve())
    own = identity(job) | {WRITTEN: written}
    journal = Journal.open(work / f"journal-{ranks.index}.jsonl", own, restart=True)
    with _forgetting_what_changed(work):
        run_tensors(job, FolderSink(work, journal, job), crew, ranks, silent)
    ranks.wait_for_all()
    return ranks.from_first(None)


@contextmanager
def _forgetting_what_changed(work: Path) -> Iterator[None]:
    """Where the checkpoint changed under the run, parts and shards may be of two models: none of them is used again."""
    try:
        yield
    except ChangedError:
        begin_anew(work)
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
    ranks.from_first(job.source.checkpoint.modified())
    if not merge_begun(work.work):
        beside = _write_tensors(job, sink, crew, ranks, listener)
    elif ranks.count > 1:
        run_tensors(job, sink, crew, ranks, listener)  # nothing is left to do, for the others neither
    ranks.wait_for_all()
    _adopt_others(sink.journal)
    if saved is not None:
        write_tensors(saved, sink.learned(), job.belonging)
    return finish(job, work, sink, listener), beside


def _result(job: Job, output: Path, account: dict[str, Any], timings: dict[str, Any]) -> Result:
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
        seconds=timings["seconds"],
        verified=account["verified"],
        peak_bytes=timings["peak_bytes"],
        resumed=timings["resumed_units"],
        notes=tuple(dict.fromkeys((*plan_of(job).notes, *account["notes"]))),
        fallbacks=tuple(account["fallbacks"]),
    )


def _write_tensors(job: Job, sink: FolderSink, crew: Crew, ranks: Ranks, listener: Listener) -> int:
    """Every part that is not there yet; the peak bytes of worker processes."""
    if isinstance(job.work, TensorWork):
        return run_tensors(job, sink, crew, ranks, listener)
    assert isinstance(job.work, BlockWork)
    plan = RunPlan(
        job.scheme,
        job.configuration.methods,
        job.scales,
        job.recipe.quantize_lm_head,
        job.configuration.training,
        job.recipe.seed,
        job.learned,
        job.arithmetic,
    )
    run(job.work.skeleton, plan, sink, tokens=job.tokens, listener=listener)
    return 0
