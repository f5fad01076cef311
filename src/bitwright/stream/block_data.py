"""Calibration data of one block, measured when a method asks for them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from bitwright.core.block import Block
from bitwright.core.decisions import BlockDecisions
from bitwright.core.method import Inspection, LinearStats, Moments
from bitwright.core.scheme import Allocation
from bitwright.core.training import Training
from bitwright.steps.apply import fold, parameters_of
from bitwright.stream.activations import Activations, statistics
from bitwright.stream.forward import outputs_of
from bitwright.stream.inspection import LinearInspection, ModuleInspection
from bitwright.stream.moments import BYTES, moments
from bitwright.stream.train import Objective


@dataclass(frozen=True)
class StreamedBlock:
    """A block with its inputs: the ``BlockData`` of ``core/method.py``.

    ``allocation`` has the schemes of its linears by their names in the block; ``scales`` is the dtype of scales.
    """

    block: Block
    inputs: Activations
    allocation: Allocation
    scales: torch.dtype
    _ahead: dict[tuple[str, bool], Moments] = field(default_factory=dict)

    @cached_property
    def _passed(self) -> tuple[dict[str, LinearStats], list[Tensor]]:
        """The statistics and the block's full-precision outputs, from one pass."""
        return statistics(self.block, self.inputs.reference)

    @property
    def stats(self) -> Mapping[str, LinearStats]:
        """The statistics of every linear's input on the full-precision stream."""
        return self._passed[0]

    def moments(self, linear: str, decisions: BlockDecisions, *, drift: bool) -> Moments:
        """The second moments of a linear's inputs.

        Those of experts are measured for several in one pass: what one of them is given changes nothing for the others.
        """
        if (linear, drift) not in self._ahead:
            self._ahead.clear()
            folded = fold(self.block.tensors, self.block.topology, decisions, self.allocation, self.scales)
            scheme, together = self.allocation.default, self._together(linear)
            found = moments(self.block, together, folded, scheme, self.inputs, drift=drift)
            self._ahead.update({(name, drift): own for name, own in found.items()})
        return self._ahead.pop((linear, drift))

    def _together(self, linear: str) -> list[str]:
        """A linear, and those of its stage that come after it, as many as memory allows."""
        groups = self.block.topology.groups
        stage = next(group.stage for group in groups if linear in group.linears)
        firsts = [group.linears[0] for group in groups if group.stage == stage and stage]
        rest = firsts[firsts.index(linear) :] if linear in firsts else [linear]
        return rest[: max(1, BYTES // (8 * self.block.weight(linear).shape[1] ** 2))]

    def inspect(self, linears: Sequence[str], enclosing: str, decisions: BlockDecisions, tokens: int) -> Inspection:
        """Linears, or the module around them, to be run on inputs of the quantized stream."""
        parameters, scheme = parameters_of(self.block, decisions), self.allocation.default
        if enclosing and enclosing not in linears:
            return ModuleInspection(self.block, enclosing, parameters, scheme, self.inputs.quantized, tokens)
        return LinearInspection(self.block, linears, parameters, scheme, self.inputs.quantized, tokens)

    def objective(self, training: Training) -> Objective:
        """The objective of training: the outputs that the block should have."""
        also = list(outputs_of(self.block, {}, self.inputs.quantized)) if training.aug_loss else None
        return Objective(self.inputs, self._passed[1], also)
