"""Tensors quantized in this process or in several, noted part by part."""

from dataclasses import replace
from threading import Lock

from bitwright.core.progress import Listener, Progress
from bitwright.core.quantized import BlockReport
from bitwright.prepare.crew import Crew
from bitwright.prepare.job import Job
from bitwright.prepare.tensor_work import TensorWork
from bitwright.stream.memory import peak_memory
from bitwright.stream.parallel import work_in_processes
from bitwright.stream.ranks import Ranks
from bitwright.stream.tensors import TensorPlan, work
from bitwright.stream.units import Unit
from bitwright.written.sink import FolderSink


def run_tensors(job: Job, sink: FolderSink, crew: Crew, ranks: Ranks, listener: Listener) -> int:
    """Makes the parts of this rank's share that are not there yet; the peak bytes of worker processes."""
    assert isinstance(job.work, TensorWork)
    units = [replace(unit, file=sink.files[unit.name]) for unit in job.work.all_units]
    done = ranks.from_first([unit.name for unit in units if sink.finished(unit.name)] if ranks.first else None)
    todo = ranks.share([unit for unit in units if unit.name not in done])
    told = _Told(todo, sink, listener)
    plan = _plan(job, sink)
    if crew.workers == 1 or len(todo) < 2:
        work(todo, plan, told.started, told.finished)
        return 0
    return work_in_processes(todo, plan, crew.workers, crew.pool, told.started, told.finished)


def _plan(job: Job, sink: FolderSink) -> TensorPlan:
    encode, stacked = job.format.encode, job.format.encode_stacked
    checkpoint, device = job.source.checkpoint, str(job.work.device)
    methods = job.configuration.methods
    return TensorPlan(checkpoint, job.scales, job.scheme, methods, device, encode, stacked, sink.folder)


class _Told:
    """What units say on their way, as progress in bytes; finished ones go to the sink."""

    def __init__(self, todo: list[Unit], sink: FolderSink, listener: Listener) -> None:
        self.sink, self.listener, self.lock = sink, listener, Lock()
        self.done, self.total = 0, sum(unit.nbytes for unit in todo)

    def started(self, tensor: str) -> None:
        """A tensor has been begun with."""
        with self.lock:
            self._tell(tensor)

    def finished(self, unit: Unit, report: BlockReport | None) -> None:
        """A unit's part is durable."""
        with self.lock:
            self.sink.made(unit, report)
            self.done += unit.nbytes
            self._tell("")

    def _tell(self, detail: str) -> None:
        self.listener(Progress("quantize", self.done, self.total, "bytes", peak_memory(), detail=detail))
