"""A pool of worker processes that start while this process still imports torch, which takes most of a start.

So nothing heavy is imported here.
"""

import subprocess
from contextlib import suppress
from types import TracebackType

from bitwright.core.child_process import child_environment, python_command, start
from bitwright.core.machine import free_memory, usable_cores

WORKER_BYTES = 260 * 2**20
"""The size of a worker process before any weight: it needs no transformers."""
THREADS = {"OMP_NUM_THREADS": "1"}
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""The setting that makes glibc ask for huge pages; page faults would take a few percent of a worker's time."""
MOST_WORKERS = 1024
"""More than anybody means. A smaller number that this machine cannot run becomes the number that it can."""


def start_workers(workers: int | None) -> "WorkerPool":
    """Start worker processes, at most as many as the machine can run; start none for a single worker.

    Raises MachineError if the system refuses a process.
    """
    if workers is None or workers > MOST_WORKERS:
        return WorkerPool()
    count = most_workers(workers, WORKER_BYTES)
    return WorkerPool(count if count > 1 else 0)


def most_workers(asked: int, nbytes: int, sharing: int = 1) -> int:
    """As many processes as were asked for, but no more than cores, or than memory holds at ``nbytes`` for each.

    ``sharing`` processes share the machine and ask the same. The result is at least 1.
    """
    free = free_memory()
    return max(1, min(asked, usable_cores() // sharing, asked if free is None else free // nbytes // sharing))


class WorkerPool:
    """Worker processes that wait for a plan; leaving the context ends those that nobody has taken.

    A worker also ends with the thread that started it.
    """

    def __init__(self, count: int = 0) -> None:
        self._waiting: list[subprocess.Popen[bytes]] = []
        try:
            for _ in range(count):
                self._waiting.append(_start())
        except BaseException:
            self._end()
            raise

    def take(self) -> "subprocess.Popen[bytes]":
        """Take a process that waits for a plan: from the pool, or a new one if the pool is empty."""
        return self._waiting.pop() if self._waiting else _start()

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        for process in self._waiting:
            end(process)


def end(process: "subprocess.Popen[bytes]") -> None:
    """Kill a worker process, and close its pipes."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):
            pipe.close() if pipe else None


def _start() -> "subprocess.Popen[bytes]":
    return start(
        python_command("bitwright.stream.worker"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**HUGE_PAGES, **child_environment(), **THREADS},
        start_new_session=True,  # Ctrl-C is for this process, which tells the workers
    )
