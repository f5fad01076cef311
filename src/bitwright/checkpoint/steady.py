"""Large files made durable while they are written, so that little is left to wait for and to keep in memory at the end.

What is durable is let go of: a model that is written would take as much memory again as it is large, page by page, and
in virtual machines, whose host has to find these pages, for several times what copying costs.
"""

import io
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from bitwright.checkpoint.ranges import forget

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

STEP_BYTES = 32 * 2**20
"""At least so much comes between two times that a file is made durable."""


@contextmanager
def steady(path: Path) -> Iterator[BinaryIO]:
    """A new file, durable when the body has succeeded. Raises OSError, later than what it is about was written."""
    raw = _Steady(path, "x")
    with io.BufferedWriter(raw) as file, ThreadPoolExecutor(1, "flush") as raw.behind:
        yield file
        file.flush()
        raw.settle()
        raw.settled()


class _Steady(io.FileIO):
    behind: ThreadPoolExecutor
    settling: Future[None] | None = None
    waiting = 0

    def write(self, data: "ReadableBuffer", /) -> int:
        """Writes as a file does; every now and then another thread makes durable what there is so far."""
        if self.waiting >= STEP_BYTES and (self.settling is None or self.settling.done()):
            self.settle()
        written = super().write(data)
        self.waiting += written
        return written

    def settle(self) -> None:
        """Begins to make durable what there is, once that is done which was begun before; raises what befell that."""
        self.settled()
        self.settling, self.waiting = self.behind.submit(_settle, self.fileno()), 0

    def settled(self) -> None:
        """Waits for what was begun; raises OSError for what befell it, which the system tells only once."""
        if self.settling is not None:
            self.settling.result()


def _settle(file: int) -> None:
    os.fsync(file)
    forget(file)
