"""Worker processes that divide the units among them; each takes the next unit when it has finished one.

They are plain processes with pipes, which start alike on every system and need no guard in a user's script.
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
from bitwright.stream.parts import Part
from bitwright.stream.pipeline import Started, TensorPlan
from bitwright.stream.units import Unit
from bitwright.stream.worker import Began, Done, Ended, Failed
from bitwright.stream.worker_pool import WorkerPool, end

UNITS_PER_WORKER = 2
"""The number of units that a worker has at a time: it works on one, and reads the first tensor of the next."""


class WorkerError(UserError):
    """The error for a worker process that ended too early."""


class _Worker:
    """A worker process; ``inbox`` receives its messages, and None when it has ended, each with the worker."""

    def __init__(
        self, process: "subprocess.Popen[bytes]", plan: TensorPlan, inbox: "queue.Queue[tuple[_Worker, Any]]"
    ) -> None:
        self.process = process
        self.inbox, self.tensor, self.ended = inbox, "", False
        self.listener = threading.Thread(target=self._listen, daemon=True)
        try:
            self.send(plan)
            self.listener.start()
        except BaseException:  # nobody else knows of the process yet
            end(process)
            raise

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


def in_processes(
    units: Sequence[Unit], plan: TensorPlan, workers: int, pool: WorkerPool, started: Started
) -> Iterator[Part]:
    """Make the parts of units in worker processes, in the order in which they are finished.

    Raises UserError for what a worker met, or if one died.
    """
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
