"""Second moments of linears' inputs on both streams, for closed forms of the range and the rounding."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from bitwright.core.block import Block
from bitwright.core.method import Moments
from bitwright.core.scheme import Scheme
from bitwright.core.weight import starred
from bitwright.steps.activations import quantized_activations
from bitwright.steps.apply import Folded
from bitwright.stream.activations import Activations, tapping
from bitwright.stream.forward import Inputs, Reached, placed, run

BYTES = 2**30
"""The most memory of second moments that are summed in one pass: those of several experts."""


@torch.no_grad()
def moments(
    block: Block, linears: Sequence[str], folded: Folded, scheme: Scheme, inputs: Activations, *, drift: bool
) -> dict[str, Moments]:
    """H = E[x' x'^T] and C = E[(x - x') x'^T] [I, I] of the inputs of linears that do not read each other, in float32.

    x is the input on the full-precision stream, through the transformed block; x' the input on the quantized stream,
    through the block as folded, with its activations quantized. Without drift C is zero. So it is for experts, whose
    tokens on the two streams need not be the same ones.
    """
    full, written = (placed(block, tensors) for tensors in (folded.full, folded.written()))
    sums = {name: _Sums(block.weight(name).shape[1], block.device) for name in linears}
    drift = drift and not any(map(_routed, linears))
    for rows in inputs.quantized.batches():
        with quantized_activations(block, scheme):
            read = _inputs(block, linears, written, inputs.quantized, rows)
        also = _inputs(block, linears, full, inputs.reference, rows) if drift else {}
        for name, x in read.items():
            sums[name].add(x, also.get(name))
    return {name: total.result() for name, total in sums.items()}


def _inputs(
    block: Block, linears: Sequence[str], tensors: Mapping[str, Tensor], inputs: Inputs, rows: Sequence[int]
) -> dict[str, Tensor]:
    """What each linear reads of some segments, [N, I] in float32; the block runs only as far as it must."""
    reader = _Reader(linears)
    with tapping(block, reader), suppress(Reached):
        run(block, tensors, inputs.call(rows, block))
    return {name: torch.cat(parts) for name, parts in reader.read.items()}


def _routed(linear: str) -> bool:
    """Whether a linear is that of an expert, by its name."""
    return "*" in starred(f"{linear}.")


class _Reader:
    """A tap that keeps what linears read; one linear alone is read once."""

    def __init__(self, linears: Sequence[str]) -> None:
        self.wanted, self.read = set(linears), dict[str, list[Tensor]]()
        self.once = len(linears) == 1 and not _routed(linears[0])

    def inputs(self, linears: Sequence[str], x: Tensor) -> None:
        """Keep the inputs of linears."""
        for name in self.wanted.intersection(linears):
            self.read.setdefault(name, []).append(x.flatten(0, -2).float())
            if self.once:
                raise Reached

    def outputs(self, linear: str, rows: slice, x: Tensor, y: Tensor) -> None:
        """Nothing to see."""


class MomentsAhead:
    """The moments of a block's linears, of experts for several in one pass.

    What is decided for one expert changes nothing for the others of its stage, so they can be measured together.
    """

    def __init__(self, block: Block, scheme: Scheme, inputs: Activations) -> None:
        self.block, self.scheme, self.inputs = block, scheme, inputs
        self._known: dict[tuple[str, bool], Moments] = {}

    def of(self, linear: str, folded: Callable[[], Folded], *, drift: bool) -> Moments:
        """The moments of a linear; ``folded`` makes the block as it is decided, if it has to run."""
        drift = drift and not _routed(linear)
        if (linear, drift) not in self._known:
            together = self._together(linear)
            measured = moments(self.block, together, folded(), self.scheme, self.inputs, drift=drift)
            self._known = {(name, drift): own for name, own in measured.items()}
        return self._known.pop((linear, drift))

    def _together(self, linear: str) -> list[str]:
        """A linear, and those of its stage that come after it, as many as memory allows."""
        groups = self.block.topology.groups
        stage = next(group.stage for group in groups if linear in group.linears)
        firsts = [group.linears[0] for group in groups if group.stage == stage and group.routed]
        rest = firsts[firsts.index(linear) :] if linear in firsts else [linear]
        return rest[: max(1, BYTES // (8 * self.block.weight(linear).shape[1] ** 2))]


class _Sums:
    """Running second moments of one linear's inputs."""

    def __init__(self, features: int, device: torch.device) -> None:
        self.second, self.cross = (torch.zeros(features, features, device=device) for _ in range(2))
        self.tokens = 0

    def add(self, read: Tensor, reference: Tensor | None) -> None:
        """Add one batch."""
        self.second.addmm_(read.T, read)
        if reference is not None:
            self.cross.addmm_((reference - read).T, read)
        self.tokens += len(read)

    def result(self) -> Moments:
        """The moments of all batches."""
        count = max(1, self.tokens)
        return Moments(self.second / count, self.cross / count, self.tokens)
