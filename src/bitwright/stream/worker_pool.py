"""A pool of worker processes that start while this process still imports torch, which takes most of a start.

So nothing heavy is imported here.
"""

import os
import subprocess
import sys
from contextlib import suppress
from types import TracebackType

THREADS = {"OMP_NUM_THREADS": "1"}
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""The setting that makes glibc ask for huge pages; page faults would take a few percent of a worker's time."""


def start_workers(workers: int | None) -> "WorkerPool":
    """Start worker processes, at most one per usable core; start none for a single worker."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return WorkerPool(min(workers, cores) if workers is not None and workers > 1 else 0)


class WorkerPool:
    """Worker processes that wait for a plan; leaving the context ends those that nobody has taken."""

    def __init__(self, count: int = 0) -> None:
        self._waiting = [_start() for _ in range(count)]

    def take(self) -> "subprocess.Popen[bytes]":
        """Take a process that waits for a plan: from the pool, or a new one if the pool is empty."""
        return self._waiting.pop() if self._waiting else _start()

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._waiting:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):
                    pipe.close() if pipe else None


def _start() -> "subprocess.Popen[bytes]":
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        [sys.executable, "-c", "from bitwright.stream.worker import main; main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**HUGE_PAGES, **os.environ, **paths, **THREADS},
        start_new_session=True,  # Ctrl-C is for this process, which tells the workers
    )
