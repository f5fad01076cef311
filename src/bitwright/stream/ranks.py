"""Several processes, on one machine or many, that make one result in one folder: started by torchrun.

Each takes a share of the units and keeps a journal of its own; the first takes everything together. They talk through
torch.distributed (gloo), and they all have to see the folder. Where one of them fails, torchrun stops the others.
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
"""How long one waits for another to finish its share."""


@dataclass(frozen=True)
class Ranks:
    """This process is number ``index`` of ``count``."""

    index: int = 0
    count: int = 1

    @classmethod
    def here(cls) -> "Ranks":
        """As torchrun says; one alone where it did not start us."""
        count = int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1
        if count == 1:
            return cls()
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", timeout=PATIENCE)
            atexit.register(_leave)  # threads of it that outlive the interpreter end the process with an abort
        return cls(torch.distributed.get_rank(), count)

    @property
    def first(self) -> bool:
        """Whether this is the one that takes everything together."""
        return self.index == 0

    @property
    def beside(self) -> int:
        """How many of them share this machine's cores."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.count > 1 else 1

    def from_first(self, value: T | None) -> T:
        """What the first has given, for all of them."""
        values = [value]
        if self.count > 1:
            torch.distributed.broadcast_object_list(values, src=0)
        assert values[0] is not None
        return values[0]

    def wait_for_all(self) -> None:
        """Comes back once every one of them has called it."""
        if self.count > 1:
            torch.distributed.barrier()

    @contextmanager
    def alike(self) -> Iterator[None]:
        """A context for what every rank does alike.

        If the first rank meets an error, it reports it, and the others raise ReportedError. An error that another rank
        has alone, or a different one, is raised there as it is.
        """
        try:
            yield
        except UserError as error:
            if self._of_first(str(error)) == str(error) and not self.first:
                raise ReportedError(str(error)) from error
            raise
        if said := self._of_first(""):
            raise ReportedError(said)

    def _of_first(self, text: str) -> str:
        return text if self.count == 1 else self.from_first(text)

    def share(self, units: Sequence[Unit]) -> list[Unit]:
        """Those of the units that are ours: each goes to the one with the fewest bytes so far, the largest first."""
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
