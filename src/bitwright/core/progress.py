"""Progress of a long operation, which the command line shows."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """A stage of an operation: ``done`` of ``total`` units are finished; ``peak_bytes`` is the process's peak memory.

    ``part`` (0 to 1) is how much of the next unit is finished; ``detail`` is the last step of it, in words. One that is
    ``resumed`` comes first if an earlier run has finished ``done`` units.
    """

    stage: str
    done: int
    total: int
    unit: str
    peak_bytes: int | None = None
    part: float = 0.0
    detail: str = ""
    resumed: bool = False

    @property
    def position(self) -> float:
        """Units that are finished, with the finished part of the next."""
        return self.done + self.part


Listener = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """Ignore progress."""
