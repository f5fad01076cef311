"""Units shared out to worker processes, which take the next when they are done with one.

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
from bitwright.stream.worker import At, Done, Ended, Failed
from bitwright.stream.worker_pool import WorkerPool

IN_HAND = 2
"""Units that a worker has at a time: one it works on, and one whose first tensor it reads meanwhile."""


class WorkerError(UserError):
    """A worker process that came to an end nobody told it to come to."""


class _Worker:
    """One process. What it says, and that it is gone, arrives in ``inbox`` with the worker itself."""

    def __init__(
        self, process: "subprocess.Popen[bytes]", plan: TensorPlan, inbox: "queue.Queue[tuple[_Worker, Any]]"
    ) -> None:
        self.process = process
        self.inbox, self.at, self.peak, self.ended = inbox, "", 0, False
        self.send(plan)
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def send(self, message: TensorPlan | Unit | None) -> None:
        """Hands over a plan, a unit, or None for the end; a worker that is gone is noticed where it is listened to."""
        assert self.process.stdin is not None
        with suppress(OSError):
            pickle.dump(message, self.process.stdin)
            self.process.stdin.flush()

    def close(self) -> None:
        """Closes the pipes of a process that has ended."""
        self.listener.join()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError):  # what was on its way to a worker that died
                pipe.close() if pipe else None

    def _listen(self) -> None:
        assert self.process.stdout is not None
        try:
            while True:
                self.inbox.put((self, pickle.load(self.process.stdout)))
        except Exception:  # the end of the pipe, in the middle of a message or not
            self.inbox.put((self, None))


def work_in_processes(
    units: Sequence[Unit], plan: TensorPlan, workers: int, pool: WorkerPool, started: Started, finished: Finished
) -> int:
    """Make the part of every unit, as ``tensors.work`` does; return the peak bytes of all workers together.

    Workers come from ``pool`` first. Raises UserError for what a worker met, or if one died; finished parts stay.
    """
    waiting, left = iter(units), len(units)
    inbox: queue.Queue[tuple[_Worker, Any]] = queue.Queue()
    with _started(pool, plan, min(workers, len(units)), inbox) as crew:
        for worker in crew * IN_HAND:
            _hand_over(worker, waiting)
        while left:
            worker, message = inbox.get()
            match message:
                case At(tensor):
                    worker.at = tensor
                    started(tensor)
                case Done(unit, report, peak):
                    worker.peak, left = peak, left - 1
                    finished(unit, report)
                    if unit.weights:
                        _hand_over(worker, waiting)
                case Failed(error, text):
                    raise error or RuntimeError(f"a worker failed at {worker.at}:\n{text}")
                case Ended():
                    worker.ended = True
                case _ if not worker.ended:
                    raise _died(worker, plan)
        return sum(worker.peak for worker in crew)


def _hand_over(worker: _Worker, waiting: Iterator[Unit]) -> None:
    """The next unit, or that there is none: a worker knows that a unit is whole when it has what comes after it. What
    is only copied comes on top."""
    while (unit := next(waiting, None)) is not None and not unit.weights:
        worker.send(unit)
    worker.send(unit)


@contextmanager
def _started(
    pool: WorkerPool, plan: TensorPlan, count: int, inbox: "queue.Queue[tuple[_Worker, Any]]"
) -> Iterator[list[_Worker]]:
    """Workers, none of which is there any more afterwards."""
    crew: list[_Worker] = []
    try:
        for _ in range(count):
            crew.append(_Worker(pool.take(), plan, inbox))
        yield crew
    except BaseException:
        for worker in crew:
            worker.process.kill()
        raise
    finally:
        for worker in crew:
            worker.process.wait()
            worker.close()


def _died(worker: _Worker, plan: TensorPlan) -> WorkerError:
    code = worker.process.wait()
    how = f"ended with code {code}"
    if code < 0:
        with suppress(ValueError):
            how = f"was killed ({signal.Signals(-code).name})"
    where = f"while it was at {worker.at}" if worker.at else "before its first tensor"
    if worker.at in plan.checkpoint:
        where += f" {list(plan.checkpoint.entry(worker.at).shape)}"
    return WorkerError(
        f"a worker process {how} {where}; out of memory? What is finished is kept: repeat the command to go on, with "
        "fewer --workers or a --max-memory below what is free if memory was the cause"
    )
