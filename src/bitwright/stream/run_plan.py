"""What a run does with every linear, whichever driver goes through the model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.core.configuration import Configured
from bitwright.core.scheme import Allocation
from bitwright.core.training import Training


@dataclass(frozen=True)
class RunPlan:
    """What to do with every linear, in a form that can be handed to another process.

    ``scales`` is the dtype that scales and outliers are stored in, and parameters that a transform moved. The rest is
    for learned methods: ``learned`` gives a block's parameters of an earlier training, which is then not repeated;
    ``arithmetic`` is the dtype that training multiplies in, None for the block's own.
    """

    allocation: Allocation
    methods: tuple[Configured, ...]
    scales: torch.dtype
    training: Training | None = None
    seed: int = 0
    learned: Callable[[str], Mapping[str, Tensor]] | None = None
    arithmetic: torch.dtype | None = None
