"""The plan of a run that all drivers share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.core.configuration import Configured
from bitwright.core.scheme import Allocation
from bitwright.core.training import Training


@dataclass(frozen=True)
class RunPlan:
    """The plan for every linear, in a form that can be sent to another process.

    ``scales`` is the stored dtype of scales, of outliers, and of parameters that a transform changed. The rest is for
    learned methods: ``learned`` returns a block's parameters from an earlier training, which is then not repeated.
    ``arithmetic`` is the dtype of the products in training, None for the block's own.
    ``all_experts``: statistics of an expert are of all tokens, not only of those that are routed to it.
    """

    allocation: Allocation
    methods: tuple[Configured, ...]
    scales: torch.dtype
    training: Training | None = None
    seed: int = 0
    learned: Callable[[str], Mapping[str, Tensor]] | None = None
    arithmetic: torch.dtype | None = None
    all_experts: bool = False
