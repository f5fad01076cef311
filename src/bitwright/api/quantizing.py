"""quantize(): write a smaller model from a model folder."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from time import monotonic
from typing import Any

from bitwright.checkpoint.journal import Journal
from bitwright.checkpoint.merge import merge_begun
from bitwright.checkpoint.output import OutputFolder, begin_anew, work_folder
from bitwright.checkpoint.ranges import changed
from bitwright.checkpoint.writer import write_json, write_tensors
from bitwright.core.account import Account, CalibrationData
from bitwright.core.errors import ChangedError, blaming_the_machine
from bitwright.core.format import FileFormat
from bitwright.core.progress import Listener, Progress, silent
from bitwright.core.recipe import Recipe
from bitwright.model.discover import EMBEDDING, OUTPUT_LAYER
from bitwright.prepare.engine_choice import for_engines
from bitwright.prepare.format_choice import DENSE
from bitwright.prepare.plan import notes_of
from bitwright.prepare.prepared import Prepared, prepare
from bitwright.prepare.question import Question
from bitwright.prepare.resources import Workers, place_to_save, refuse_output, require_room, workers_for
from bitwright.stream.memory import peak_memory
from bitwright.stream.ranks import Ranks
from bitwright.stream.worker_pool import WorkerPool
from bitwright.written.account import DATA, WRITTEN, identity
from bitwright.written.beside_weights import sidecars
from bitwright.written.finishing import finish
from bitwright.written.sink import JOURNAL, Sink

TIMINGS, OTHER_JOURNALS = "bitwright-timings.json", "journal-*.jsonl"

FULL = "f16"
"""The ``--embeddings`` that leaves embedding and output layer at 16 bits."""


@dataclass(frozen=True)
class Result:
    """The result of a run; sizes are in bytes.

    ``bits_per_weight`` is that of the quantized linears together; it counts scales, zeros and outliers.
    ``model_bits_per_weight`` is that of the whole model: all bytes that were written, over all parameters of the
    original. ``left_alone`` is the share of the weights of matrices that stays in full precision, ``full_bits`` bits
    each, by the reason; embedding and output layer are left out for engines' files, which quantize them. ``per_ic`` is
    the number of linears whose groups go along the output, ``outliers`` the number of weights that are kept exactly.
    ``calibration`` is the data that the methods were given, and what each of its segments begins with.
    ``verified`` says what was checked when the folder was read back.
    """

    output: str
    scheme: str
    method: str
    format: str
    linears: int
    per_ic: int
    outliers: int
    bits_per_weight: float
    model_bits_per_weight: float
    left_alone: dict[str, float]
    full_bits: int
    bytes_in: int
    bytes_out: int
    calibration: CalibrationData | None
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
    """Run a recipe and write the quantized model. Raises UserError.

    The work is done in ``OUTPUT.partial``, which is renamed at the end, so an output that exists is complete. After a
    kill at any moment, the same call continues; a changed recipe is refused unless ``restart``.

    Methods without calibration data divide the tensors among processes, under torchrun on several machines; the bytes
    of the result do not depend on their number. ``workers`` is the number of processes, ``max_memory`` ("2GB") bounds
    the memory of all of them together. ``pool`` holds worker processes that have been started already.
    """
    start, output, ranks = monotonic(), Path(output), Ranks.here()
    with ranks.alike():
        question = Question.of(recipe)
        if recipe.engines is not None:
            question = for_engines(question, device)
        refuse_output(Path(recipe.model), output, overwrite, question.single)
        run = prepare(question, device)
        crew = Crew(workers_for(run, workers, max_memory, ranks), pool, ranks)
    if not ranks.first:
        return _help(run, output, crew)
    saved = None if save_parameters is None else place_to_save(run, Path(save_parameters), output)
    require_room(run, output)
    times = run.source.checkpoint.changed_times()
    data, beside = run.way.check_weights(listener), sidecars(run.source.checkpoint.folder)
    with OutputFolder.claim(output, overwrite=overwrite, restart=restart, single=question.single) as work:
        own = identity(run, data, beside)
        journal = Journal.open(work.work / JOURNAL, own, restart, lambda *read: listener(_read_again(*read)))
        resumed = _adopt_others(journal)
        with _forgetting_what_changed(work.work), blaming_the_machine():
            crew.ranks.from_first({key: own[key] for key in (WRITTEN, DATA)})
            account, of_workers = _produce(run, work, journal, saved, crew, beside, listener)
            if run.source.checkpoint.changed_times() != times and run.way.check_weights(listener) != data:
                raise changed(run.source.checkpoint.folder, "weight files are not what they were when it began")
        timings = {"seconds": monotonic() - start, "peak_bytes": peak_memory() + of_workers, "resumed_units": resumed}
        if not question.single:
            write_json(work.path / TIMINGS, timings)
        work.publish()
    return ranks.from_first(_result(run, output, account, timings, crew.workers))


def speaks() -> bool:
    """Whether this process shows the result: of the processes that torchrun starts, only the first does."""
    return Ranks.here().first


@dataclass(frozen=True)
class Crew:
    """The processes that work on one result: worker processes, and other ranks."""

    workers: Workers
    pool: WorkerPool | None
    ranks: Ranks

    def write_parts(self, run: Prepared, work: Path, journal: Journal, listener: Listener) -> Sink:
        """Write the missing parts of this rank's share, and note them in the journal."""
        driver = run.driver(work, self.workers.count, self.pool, self.ranks)
        sink = Sink(work, journal, driver.units)
        if not merge_begun(work) or self.ranks.count > 1:  # the ranks ask one another even if nothing is left to do
            sink.take(driver.parts(sink.files, sink.done, listener))
        return sink


def _produce(
    run: Prepared,
    work: OutputFolder,
    journal: Journal,
    saved: Path | None,
    crew: Crew,
    beside: Mapping[str, str],
    listener: Listener,
) -> tuple[Account, int]:
    """Make the result in the work folder; return its account, and the peak bytes of the worker processes."""
    sink = crew.write_parts(run, work.work, journal, listener)
    crew.ranks.wait_for_all()
    _adopt_others(journal, just_written=True)
    if saved is not None:
        write_tensors(saved, sink.learned, run.belonging)
    return finish(run, work, sink, beside, listener), sink.peak_bytes


def _read_again(read: int, total: int) -> Progress:
    """The progress of reading what an earlier run finished, to see whether it is still the same."""
    return Progress("read again", read, total, "bytes", peak_memory())


def _help(run: Prepared, output: Path, crew: Crew) -> Result:
    """Make the share of a rank that is not the first. It has its own journal, which the first rank takes over."""
    ranks = crew.ranks
    of_first: dict[str, Any] = ranks.from_first(None)  # the first rank's times, and it has made the folder
    work = work_folder(output.resolve())
    own = identity(run, "", sidecars(run.source.checkpoint.folder)) | of_first
    journal = Journal.open(work / f"journal-{ranks.index}.jsonl", own, restart=True)
    with _forgetting_what_changed(work), blaming_the_machine():
        crew.write_parts(run, work, journal, silent)
    ranks.wait_for_all()
    return ranks.from_first(None)


@contextmanager
def _forgetting_what_changed(work: Path) -> Iterator[None]:
    """Discard all parts if the checkpoint changes during the run: they may belong to two models."""
    try:
        yield
    except ChangedError:
        begin_anew(work)
        raise


def _adopt_others(journal: Journal, *, just_written: bool = False) -> int:
    """Take over the finished units of other ranks; return the number of all that are finished."""
    for other in sorted(journal.path.parent.glob(OTHER_JOURNALS)):
        journal.adopt(other, just_written=just_written)
    return len(journal.recorded if merge_begun(journal.path.parent) else journal.done)


def _left_alone(run: Prepared, format: str) -> dict[str, float]:
    """The share of matrices that stays in full precision, by the reason; nothing if all are stored so."""
    if format == DENSE:
        return {}
    checkpoint = run.source.checkpoint
    floating = {name: checkpoint.entry(name).shape for name in checkpoint.names
                if checkpoint.entry(name).dtype.is_floating_point}  # fmt: skip
    shares = run.inventory.left_alone(floating)
    in_file = isinstance(run.target, FileFormat) and run.recipe.embeddings != FULL
    with_codes = (EMBEDDING, OUTPUT_LAYER) if in_file else ()
    return {why: share for why, share in shares.items() if why not in with_codes}


def _result(run: Prepared, output: Path, account: Account, timings: dict[str, Any], workers: Workers) -> Result:
    errors = [block.output_error for block in account.blocks if block.output_error is not None]
    totals = account.totals
    assert totals is not None
    return Result(
        output=str(output),
        scheme=account.scheme,
        method=account.method,
        format=account.format,
        linears=totals.linears,
        per_ic=totals.per_ic,
        outliers=totals.outliers,
        bits_per_weight=totals.bits_per_weight,
        model_bits_per_weight=8 * totals.bytes_out / sum(map(prod, run.source.checkpoint.shapes.values())),
        left_alone=_left_alone(run, account.format),
        full_bits=8 * run.source.checkpoint.dtype_of_weights.itemsize,
        bytes_in=totals.bytes_in,
        bytes_out=totals.bytes_out,
        calibration=account.calibration,
        output_error=errors[-1] if errors else None,
        seconds=timings["seconds"],
        verified=account.verified,
        peak_bytes=timings["peak_bytes"],
        resumed=timings["resumed_units"],
        notes=tuple(dict.fromkeys((*notes_of(run, workers), *account.notes))),
        fallbacks=account.fallbacks,
    )
