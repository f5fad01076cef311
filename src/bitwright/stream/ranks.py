"""Ranks: processes on one or many machines that make one result in one folder; torchrun starts them.

Each rank makes a share of the units and keeps its own journal; the first rank assembles the result. Ranks communicate
through torch.distributed (gloo), and all must see the folder. If one fails, torchrun stops the others.
"""

import atexit
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed

from bitwright.core.errors import ReportedError, UserError
from bitwright.stream.units import Unit

T = TypeVar("T")
PATIENCE = timedelta(days=7)
"""The time that a rank waits for another to finish its share."""


@dataclass(frozen=True)
class Ranks:
    """This process's place among the ranks: it is number ``index`` of ``count``."""

    index: int = 0
    count: int = 1

    @classmethod
    def here(cls) -> "Ranks":
        """The rank that torchrun gave this process; a single rank if torchrun did not start it."""
        count = int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1
        if count == 1:
            return cls()
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", timeout=PATIENCE)
            atexit.register(_leave)  # threads of gloo would abort the process if they outlived the interpreter
        return cls(torch.distributed.get_rank(), count)

    @property
    def first(self) -> bool:
        """Whether this is the rank that assembles the result."""
        return self.index == 0

    @property
    def beside(self) -> int:
        """The number of ranks that share this machine's cores."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.count > 1 else 1

    def from_first(self, value: T | None) -> T:
        """Broadcast the first rank's value to all of them."""
        values = [value]
        if self.count > 1:
            torch.distributed.broadcast_object_list(values, src=0)
        assert values[0] is not None
        return values[0]

    def wait_for_all(self) -> None:
        """Wait until every rank has called this."""
        if self.count > 1:
            torch.distributed.barrier()

    @contextmanager
    def alike(self) -> Iterator[None]:
        """A context for work that every rank does by itself, with the same result on each.

        If the first rank has an error, it reports it, and the others raise ReportedError. If another rank has an error
        that the first does not have, that error is raised there as it is.
        """
        try:
            yield
        except UserError as error:
            if self._text_from_first(str(error)) == str(error) and not self.first:
                raise ReportedError(str(error)) from error
            raise
        if reported := self._text_from_first(""):
            raise ReportedError(reported)

    def _text_from_first(self, text: str) -> str:
        return text if self.count == 1 else self.from_first(text)

    def share(self, units: Sequence[Unit]) -> list[Unit]:
        """This rank's units: the largest first, each unit goes to the rank with the fewest bytes so far."""
        loads, mine = [0] * self.count, set()
        for unit in sorted(units, key=lambda unit: -unit.nbytes):
            least = loads.index(min(loads))
            loads[least] += unit.nbytes
            if least == self.index:
                mine.add(unit.name)
        return [unit for unit in units if unit.name in mine]


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
