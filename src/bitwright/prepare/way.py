"""The way through a model: block by block, or tensor by tensor. Nobody asks afterwards which of them it is."""

from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from bitwright.core.progress import Listener
from bitwright.core.training import Training
from bitwright.model.source import Source
from bitwright.prepare.block_way import BlockWay
from bitwright.prepare.inventory import Inventory
from bitwright.prepare.question import Question
from bitwright.prepare.tensor_way import TensorWay
from bitwright.stream.memory import Budget
from bitwright.stream.parts import Driver, PartWriter
from bitwright.stream.ranks import Ranks
from bitwright.stream.run_plan import RunPlan
from bitwright.stream.worker_pool import WorkerPool


class Way(Protocol):
    """``BlockWay`` or ``TensorWay``."""

    @property
    def inventory(self) -> Inventory:
        """The model's tensors."""

    @property
    def device(self) -> torch.device:
        """The device of the arithmetic."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic."""

    @property
    def shares_out(self) -> bool:
        """Whether several processes can share the work."""

    def read_calibration(self, question: Question) -> Int[Tensor, "N T"] | None:
        """The calibration segments, None if no calibration data are named. Raises UserError."""

    def budget(self, tokens: Int[Tensor, "N T"] | None, training: Training | None) -> Budget:
        """The memory that one process needs."""

    def check_weights(self, listener: Listener) -> None:
        """Look for weights that are no numbers, if hours of work follow. Raises CheckpointError."""

    def driver(
        self,
        plan: RunPlan,
        writer: PartWriter,
        tokens: Int[Tensor, "N T"] | None,
        workers: int,
        pool: WorkerPool,
        ranks: Ranks,
    ) -> Driver:
        """What makes the parts."""


def opened(question: Question, device: str, *, tokenizer: bool) -> tuple[Source, Way]:
    """The model of a recipe, and the way that its methods take through it; no weight is read.

    Raises UserError, also, with ``tokenizer``, if the model has none.
    """
    source = Source.open(Path(question.recipe.model), to_build=not question.alone, tokenizer=tokenizer)
    way = TensorWay.open(question, source, device) if question.alone else BlockWay.open(question, source, device)
    return source, way
