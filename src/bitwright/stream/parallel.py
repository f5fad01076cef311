"""Worker processes that divide the units among them; each takes the next unit when it has finished one.

They are plain processes with pipes, which start alike on every system and need no guard in a user's script.
"""

import pickle
import queue
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from bitwright.core.errors import UserError
from bitwright.core.progress import Listener, Progress
from bitwright.stream.memory import peak_memory
from bitwright.stream.parts import Part
from bitwright.stream.ranks import Ranks
from bitwright.stream.tensors import Started, TensorPlan, pipeline
from bitwright.stream.units import Unit
from bitwright.stream.worker import Began, Done, Ended, Failed
from bitwright.stream.worker_pool import WorkerPool

UNITS_PER_WORKER = 2
"""The number of units that a worker has at a time: it works on one, and reads the first tensor of the next."""


class WorkerError(UserError):
    """The error for a worker process that ended too early."""


class _StoppedError(Exception):
    """An exception for the thread that works: nobody takes its parts any more."""


class _Worker:
    """A worker process; ``inbox`` receives its messages, and None when it has ended, each with the worker."""

    def __init__(
        self, process: "subprocess.Popen[bytes]", plan: TensorPlan, inbox: "queue.Queue[tuple[_Worker, Any]]"
    ) -> None:
        self.process = process
        self.inbox, self.tensor, self.ended = inbox, "", False
        self.send(plan)
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def send(self, message: TensorPlan | Unit | None) -> None:
        """Send a plan, a unit, or None for the end. The listening thread notices a worker that has ended."""
        assert self.process.stdin is not None
        with suppress(OSError):
            pickle.dump(message, self.process.stdin)
            self.process.stdin.flush()

    def close(self) -> None:
        """Close the pipes of a process that has ended."""
        self.listener.join()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError):  # data was still to be sent to a worker that died
                pipe.close() if pipe else None

    def _listen(self) -> None:
        assert self.process.stdout is not None
        try:
            while True:
                self.inbox.put((self, pickle.load(self.process.stdout)))
        except Exception:  # the pipe ends, perhaps in the middle of a message
            self.inbox.put((self, None))


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
        total, finished = sum(nbytes.values()), 0

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
    return _in_processes(units, plan, workers, pool, started)


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


def _in_processes(
    units: Sequence[Unit], plan: TensorPlan, workers: int, pool: WorkerPool, started: Started
) -> Iterator[Part]:
    waiting, left, by_name = iter(units), len(units), {unit.name: unit for unit in units}
    inbox: queue.Queue[tuple[_Worker, Any]] = queue.Queue()
    with _started(pool, plan, min(workers, len(units)), inbox) as processes:
        for worker in processes * UNITS_PER_WORKER:
            _send_next(worker, waiting)
        while left:
            worker, message = inbox.get()
            match message:
                case Began(tensor):
                    worker.tensor = tensor
                    started(tensor)
                case Done(part):
                    left -= 1
                    if by_name[part.unit].weights:
                        _send_next(worker, waiting)
                    yield part
                case Failed(error, text):
                    raise error or RuntimeError(f"a worker failed at {worker.tensor}:\n{text}")
                case Ended():
                    worker.ended = True
                case _ if not worker.ended:
                    raise _died(worker, plan)


def _send_next(worker: _Worker, waiting: Iterator[Unit]) -> None:
    """Send the next unit with weights, and the copied units before it; send None if no unit is left.

    A worker finishes a unit only after it has received the next one.
    """
    while (unit := next(waiting, None)) is not None and not unit.weights:
        worker.send(unit)
    worker.send(unit)


@contextmanager
def _started(
    pool: WorkerPool, plan: TensorPlan, count: int, inbox: "queue.Queue[tuple[_Worker, Any]]"
) -> Iterator[list[_Worker]]:
    """A context with started workers; it ends them all."""
    workers: list[_Worker] = []
    try:
        for _ in range(count):
            workers.append(_Worker(pool.take(), plan, inbox))
        yield workers
    except BaseException:
        for worker in workers:
            worker.process.kill()
        raise
    finally:
        for worker in workers:
            worker.process.wait()
            worker.close()


def _died(worker: _Worker, plan: TensorPlan) -> WorkerError:
    code = worker.process.wait()
    how = f"ended with code {code}"
    if code < 0:
        with suppress(ValueError):
            how = f"was killed ({signal.Signals(-code).name})"
    where = f"while it was at {worker.tensor}" if worker.tensor else "before its first tensor"
    if worker.tensor in plan.checkpoint:
        where += f" {list(plan.checkpoint.entry(worker.tensor).shape)}"
    return WorkerError(
        f"a worker process {how} {where}; out of memory? What is finished is kept: repeat the command to go on, with "
        "fewer --workers or a --max-memory below what is free if memory was the cause"
    )
