"""A quantized folder beside the original: the relative squared error of every weight."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.progress import Listener, Progress
from bitwright.formats import QuantizedFolder
from bitwright.stream.memory import peak_memory
from bitwright.verification.completeness import HEADS
from bitwright.verification.findings import MOVED, SCALES_MOVED, Check, undecided

Pair = tuple[Tensor, Tensor]
ANOTHER = 0.9
"""The relative squared error from which on a weight is not the original's.

That of a weight of zeros is 1, that of another weight of the same size 2. Two bits per channel lose less than half of
this.
"""
ROWS_BYTES = 64 * 2**20
"""Bytes of a tensor that are read at a time."""


@dataclass
class Beside:
    """Relative squared errors ``|W - Wq|^2 / |W|^2``: of the quantized linears, and of all other tensors."""

    model: QuantizedFolder
    original: Checkpoint
    linears: dict[str, float] = field(default_factory=dict)
    others: dict[str, float] = field(default_factory=dict)

    def look(self, listener: Listener) -> None:
        """Read every tensor that both have."""
        names = (*self.model.linears, *self.model.stacks, *self.model.passed)
        for done, name in enumerate(names):
            listener(Progress("verify", done, len(names), name, peak_memory(), detail="beside the original"))
            if name in self.model.passed:
                if name in self.original and self.original.entry(name).dtype.is_floating_point:
                    self.others[name] = error_in_parts(self._of_rows(name))
            elif (tensor := self._tensor(name)) is not None:
                self.linears[name] = error_in_parts(self._of_linear(name, tensor))

    @property
    def worst(self) -> str | None:
        """The quantized linear that is furthest from the original."""
        return max(self.linears, key=self.linears.__getitem__, default=None)

    @property
    def mean(self) -> float | None:
        """The mean error of the quantized linears; None if there are none."""
        return sum(self.linears.values()) / len(self.linears) if self.linears else None

    def check(self, decided: bool, sure: bool, another: bool = False) -> Check:
        """Whether every weight is the original's.

        ``decided``: linears are known to be right from elsewhere, and none is refused. ``sure``: if scales were moved,
        something else tells whether this is the original. ``another``: something else tells that it is not.
        """
        errors = self.others if decided else self.linears | self.others
        worst = max(errors, key=errors.__getitem__, default=None)
        if self.worst is None or self.mean is None:
            return Check("weights", None, "not looked at: the original has none of these tensors")
        most = f"relative error at most {self.linears[self.worst]:.3g} (in {self.worst})"
        summary = f"{len(self.linears)} linears, {most}, {self.mean:.3g} on average"
        if another:
            return Check("weights", None, f"not decided: {summary}; names or config.json are another model's")
        moved = max((e for n, e in self.others.items() if len(self.model.shape(n)) == 1), default=0.0) > MOVED
        if moved and not sure:
            return undecided(summary)
        if moved:
            summary += f"; {SCALES_MOVED}"
        elif worst is not None and errors[worst] >= ANOTHER:
            return Check("weights", False, f"{worst} is not the original's: a relative error of {errors[worst]:.3g}")
        return Check("weights", True, summary)

    def _tensor(self, linear: str) -> str | None:
        """The original's tensor of a linear or stack; for an output layer that is tied there, the embedding."""
        tied = [name for name in self.original.names if name.endswith(("embed_tokens.weight", "wte.weight"))]
        names = (f"{linear}.weight", linear, *(tied if linear in HEADS else ()))
        return next((name for name in names if name in self.original), None)

    def _of_linear(self, linear: str, tensor: str) -> Iterator[Pair]:
        """The whole linear, or a stack slice by slice."""
        if linear not in self.model.stacks:
            yield self.original.read(tensor), self.model.read(linear).dequantize(torch.float32)
            return
        for number, part in enumerate(self.model.slices(linear)):
            yield self.original.read_slice(tensor, number, number + 1)[0], part.dequantize(torch.float32)

    def _of_rows(self, name: str) -> Iterator[Pair]:
        """A tensor that is not quantized, some rows at a time."""
        entry, here = self.original.entry(name), self.model.checkpoint
        if not entry.shape or not entry.nbytes:
            yield self.original.read(name), here.read(name)
            return
        few = max(1, entry.shape[0] * ROWS_BYTES // entry.nbytes)
        for start in range(0, entry.shape[0], few):
            stop = min(start + few, entry.shape[0])
            yield self.original.read_slice(name, start, stop), here.read_slice(name, start, stop)


def error_in_parts(pairs: Iterable[Pair]) -> float:
    """``|W - Wq|^2 / |W|^2`` of a tensor in parts: pairs of original and quantized values."""
    gone = size = 0.0
    for before, after in pairs:
        was = before.float()
        gone += float(torch.linalg.vector_norm(after.float() - was).double().square())
        size += float(torch.linalg.vector_norm(was).double().square())
    return gone / size if size else (0.0 if not gone else float("inf"))
