"""Worker processes, which may be started before it is known what they will do: most of a start is importing torch.

Nothing here imports it.
"""

import os
import subprocess
import sys
from contextlib import suppress
from types import TracebackType


class Hands:
    """So many processes that wait for a plan; those that nobody has taken end with the block."""

    def __init__(self, count: int = 0) -> None:
        self._waiting = [_start() for _ in range(count)]

    def take(self) -> "subprocess.Popen[bytes]":
        """One that waits, or else a new one."""
        return self._waiting.pop() if self._waiting else _start()

    def __enter__(self) -> "Hands":
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


THREADS = {"OMP_NUM_THREADS": "1"}
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Has glibc ask for them: a few percent of what a worker takes is finding its memory page by page."""


def _start() -> "subprocess.Popen[bytes]":
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        [sys.executable, "-c", "from bitwright.stream.worker import main; main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**HUGE_PAGES, **os.environ, **paths, **THREADS},
        start_new_session=True,  # Ctrl-C is for us; we tell them
    )
