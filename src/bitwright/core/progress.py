"""What a long operation says while it runs; the command line shows it."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """``done`` of ``total`` units of a stage are finished; ``peak_bytes`` is the process's peak memory."""

    stage: str
    done: int
    total: int
    unit: str
    peak_bytes: int | None = None


Listener = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """Listens to nothing."""
