"""The driver that goes through a checkpoint tensor by tensor, whatever the architecture: no model is built."""

import queue
import threading
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from bitwright.core.progress import Listener, Progress
from bitwright.stream.memory import peak_memory
from bitwright.stream.parallel import in_processes
from bitwright.stream.parts import Part
from bitwright.stream.pipeline import Started, TensorPlan, pipeline
from bitwright.stream.ranks import Ranks
from bitwright.stream.units import Unit
from bitwright.stream.worker_pool import WorkerPool


@dataclass(frozen=True)
class TensorDriver:
    """A driver that goes through a checkpoint tensor by tensor, in this process or in worker processes.

    Workers come from ``pool`` first. Each of several ranks makes its share.
    """

    all_units: Sequence[Unit]
    plan: TensorPlan
    workers: int
    pool: WorkerPool
    ranks: Ranks

    @property
    def units(self) -> list[str]:
        """All tensors, in units."""
        return [unit.name for unit in self.all_units]

    def parts(self, files: Mapping[str, str], done: Collection[str], listener: Listener) -> Iterator[Part]:
        """Make this rank's share of the parts.

        Raises the UserError of a worker, or one for a worker that died; finished parts stay.
        """
        done = self.ranks.from_first(frozenset(done) if self.ranks.first else None)
        units = [replace(unit, file=files[unit.name]) for unit in self.all_units if unit.name not in done]
        todo = self.ranks.share(units)
        nbytes = {unit.name: unit.nbytes for unit in todo}
        before = [unit for unit in self.all_units if unit.name in done] if self.ranks.count == 1 else []
        finished = sum(unit.nbytes for unit in before)
        total = finished + sum(nbytes.values())
        if before:
            listener(Progress("quantize", len(before), len(self.all_units), "parts", resumed=True))

        one_at_a_time = threading.Lock()

        def started(tensor: str) -> None:
            with one_at_a_time:
                listener(Progress("quantize", finished, total, "bytes", peak_memory(), detail=tensor))

        for part in _in_parts(todo, self.plan, self.workers, self.pool, started):
            yield part
            finished += nbytes[part.unit]
            started("")


def _in_parts(
    units: Sequence[Unit], plan: TensorPlan, workers: int, pool: WorkerPool, started: Started
) -> Iterator[Part]:
    if workers == 1 or len(units) < 2:
        return _in_this_process(units, plan, started)
    return in_processes(units, plan, workers, pool, started)


class _StoppedError(Exception):
    """An exception for the thread that works: nobody takes its parts any more."""


def _in_this_process(units: Sequence[Unit], plan: TensorPlan, started: Started) -> Iterator[Part]:
    """Work in a thread, so that each part is yielded as soon as it is durable."""
    durable: queue.SimpleQueue[Part | BaseException | None] = queue.SimpleQueue()
    stop = threading.Event()

    def unless_stopped(tensor: str) -> None:
        if stop.is_set():
            raise _StoppedError
        started(tensor)

    def work() -> None:
        try:
            deque(pipeline(units, plan, unless_stopped, durable.put), maxlen=0)
            durable.put(None)
        except BaseException as error:
            durable.put(error)

    thread = threading.Thread(target=work, name="tensors")
    thread.start()
    try:
        while (part := durable.get()) is not None:
            if isinstance(part, BaseException):
                raise part
            yield part
    finally:
        stop.set()
        thread.join()
