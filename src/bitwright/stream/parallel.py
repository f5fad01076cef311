"""Units shared out to worker processes; each takes the next unit when it is done with one.

Plain processes with pipes: they start the same way everywhere, and a script that quantizes needs no guard around it.
"""

import pickle
import queue
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from bitwright.core.errors import UserError
from bitwright.stream.tensors import Finished, Started, TensorPlan
from bitwright.stream.units import Unit
from bitwright.stream.worker import Began, Done, Ended, Failed
from bitwright.stream.worker_pool import WorkerPool

UNITS_PER_WORKER = 2
"""The units that a worker has at a time: one it works on, and one whose first tensor it reads meanwhile."""


class WorkerError(UserError):
    """A worker process that ended too early."""


class _Worker:
    """One process. Its messages, and the news that it is gone, arrive in ``inbox`` with the worker itself."""

    def __init__(
        self, process: "subprocess.Popen[bytes]", plan: TensorPlan, inbox: "queue.Queue[tuple[_Worker, Any]]"
    ) -> None:
        self.process = process
        self.inbox, self.tensor, self.peak, self.ended = inbox, "", 0, False
        self.send(plan)
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def send(self, message: TensorPlan | Unit | None) -> None:
        """Send a plan, a unit, or None for the end. A worker that is gone is noticed by the listener."""
        assert self.process.stdin is not None
        with suppress(OSError):
            pickle.dump(message, self.process.stdin)
            self.process.stdin.flush()

    def close(self) -> None:
        """Close the pipes of a process that has ended."""
        self.listener.join()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError):  # data was on its way to a worker that died
                pipe.close() if pipe else None

    def _listen(self) -> None:
        assert self.process.stdout is not None
        try:
            while True:
                self.inbox.put((self, pickle.load(self.process.stdout)))
        except Exception:  # the pipe ends, perhaps in the middle of a message
            self.inbox.put((self, None))


def work_in_processes(
    units: Sequence[Unit], plan: TensorPlan, count: int, pool: WorkerPool, started: Started, finished: Finished
) -> int:
    """Make the part of every unit, as ``tensors.work`` does; return the peak bytes of all workers together.

    Workers come from ``pool`` first. Raises UserError for what a worker met, or if one died; finished parts stay.
    """
    waiting, left = iter(units), len(units)
    inbox: queue.Queue[tuple[_Worker, Any]] = queue.Queue()
    with _started(pool, plan, min(count, len(units)), inbox) as workers:
        for worker in workers * UNITS_PER_WORKER:
            _send_next(worker, waiting)
        while left:
            worker, message = inbox.get()
            match message:
                case Began(tensor):
                    worker.tensor = tensor
                    started(tensor)
                case Done(unit, report, peak):
                    worker.peak, left = peak, left - 1
                    finished(unit, report)
                    if unit.weights:
                        _send_next(worker, waiting)
                case Failed(error, text):
                    raise error or RuntimeError(f"a worker failed at {worker.tensor}:\n{text}")
                case Ended():
                    worker.ended = True
                case _ if not worker.ended:
                    raise _died(worker, plan)
        return sum(worker.peak for worker in workers)


def _send_next(worker: _Worker, waiting: Iterator[Unit]) -> None:
    """Send the next unit with weights, and the copied ones before it; or None if no unit is left.

    A worker finishes a unit only once it has seen what comes after it.
    """
    while (unit := next(waiting, None)) is not None and not unit.weights:
        worker.send(unit)
    worker.send(unit)


@contextmanager
def _started(
    pool: WorkerPool, plan: TensorPlan, count: int, inbox: "queue.Queue[tuple[_Worker, Any]]"
) -> Iterator[list[_Worker]]:
    """Start workers; none of them runs any more when the context is left."""
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
