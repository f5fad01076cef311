"""Calibration data of one block, measured when a method asks for them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bitwright.core.block import Block
from bitwright.core.decisions import BlockDecisions
from bitwright.core.method import LinearStats, Moments
from bitwright.core.scheme import Allocation
from bitwright.core.training import Training
from bitwright.steps.apply import fold, parameters_of
from bitwright.stream.activations import Stream, statistics
from bitwright.stream.forward import forward_all
from bitwright.stream.inspection import ModuleInspection
from bitwright.stream.moments import moments
from bitwright.stream.train import Objective


@dataclass(frozen=True)
class StreamedBlock:
    """A block with its inputs: the ``BlockData`` of ``core/method.py``.

    ``allocation`` has the schemes of its linears by their names in the block; ``scales`` is the dtype of scales.
    """

    block: Block
    stream: Stream
    allocation: Allocation
    scales: torch.dtype

    @cached_property
    def _passed(self) -> tuple[dict[str, LinearStats], Tensor]:
        """The statistics and the block's full-precision outputs, from one pass."""
        return statistics(self.block, self.stream)

    @property
    def stats(self) -> Mapping[str, LinearStats]:
        """The statistics of every linear's input on the full-precision stream."""
        return self._passed[0]

    def moments(self, linear: str, decisions: BlockDecisions, *, drift: bool) -> Moments:
        """The second moments of a linear's inputs."""
        block, parameters = self.block, dict(self.block.module.named_parameters())
        folded = fold(parameters, block.topology, decisions, self.allocation, self.scales)
        inputs, kwargs = self.stream.activations, self.stream.kwargs_of(block)
        return moments(block, linear, folded, self.allocation.default, inputs, kwargs, drift=drift)

    def inspect(self, module: str, decisions: BlockDecisions, tokens: int) -> ModuleInspection:
        """A module of the block, to be run on inputs of the quantized stream."""
        inputs, kwargs = self.stream.activations.quantized, self.stream.kwargs_of(self.block)
        parameters = parameters_of(self.block, decisions)
        return ModuleInspection(self.block, module, parameters, self.allocation.default, inputs, kwargs, tokens)

    def objective(self, training: Training) -> Objective:
        """The objective of training: the outputs that the block should have."""
        inputs, kwargs = self.stream.activations, self.stream.kwargs_of(self.block)
        also = forward_all(self.block, {}, inputs.quantized, kwargs) if training.aug_loss else None
        return Objective(inputs, self._passed[1], also, kwargs)
