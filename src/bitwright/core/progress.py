"""What a long operation says while it runs; the command line shows it."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """``done`` of ``total`` units of a stage are finished; ``peak_bytes`` is the process's peak memory.

    Of the unit that is being worked on, ``part`` (0 to 1) is behind; ``detail`` says what was done last.
    """

    stage: str
    done: int
    total: int
    unit: str
    peak_bytes: int | None = None
    part: float = 0.0
    detail: str = ""

    @property
    def position(self) -> float:
        """Units that are finished, and the part of the next."""
        return self.done + self.part


Listener = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """Listens to nothing."""
