"""Calibration data of one block, measured when a method asks for them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bitwright.core.block import Block
from bitwright.core.decisions import BlockDecisions
from bitwright.core.method import Inspection, LinearStats, Moments
from bitwright.core.scheme import Allocation
from bitwright.core.training import Training
from bitwright.steps.apply import Folded, fold, parameters_of
from bitwright.stream.activations import Activations, statistics
from bitwright.stream.forward import outputs_of
from bitwright.stream.inspection import LinearInspection, ModuleInspection
from bitwright.stream.moments import MomentsAhead
from bitwright.stream.routing import every_expert
from bitwright.stream.train import Objective


@dataclass(frozen=True)
class StreamedBlock:
    """A block with its inputs: the ``BlockData`` of ``core/method.py``.

    ``allocation`` has the schemes of its linears by their names in the block; ``scales`` is the dtype of scales.
    ``all_experts``: statistics of an expert are of all tokens.
    """

    block: Block
    inputs: Activations
    allocation: Allocation
    scales: torch.dtype
    all_experts: bool = False

    @cached_property
    def _passed(self) -> tuple[dict[str, LinearStats], list[Tensor]]:
        """The statistics and the block's full-precision outputs, from one pass."""
        stats, outputs = statistics(self.block, self.inputs.reference)
        if self.all_experts:
            with every_expert(self.block, wanted=True):
                stats, _ = statistics(self.block, self.inputs.reference)
        return stats, outputs

    @property
    def stats(self) -> Mapping[str, LinearStats]:
        """The statistics of every linear's input on the full-precision stream."""
        return self._passed[0]

    def moments(self, linear: str, decisions: BlockDecisions, *, drift: bool) -> Moments:
        """The second moments of a linear's inputs."""
        block = self.block

        def folded() -> Folded:
            return fold(block.tensors, block.topology, decisions, self.allocation, self.scales)

        with every_expert(block, self.all_experts):
            return self._ahead.of(linear, folded, drift=drift)

    @cached_property
    def _ahead(self) -> MomentsAhead:
        return MomentsAhead(self.block, self.allocation.default, self.inputs)

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
