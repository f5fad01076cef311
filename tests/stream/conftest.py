"""The tiny model as the stream sees it, and as transformers does."""

from collections.abc import Callable

import pytest
import torch
from tests.streamed import block, skeleton_of, streamed

from bitwright.stream.skeleton import Skeleton

SEQUENCES, LENGTH = 6, 20

__all__ = ["block", "streamed"]  # fixtures

SkeletonOf = Callable[..., Skeleton]


@pytest.fixture
def skeleton() -> SkeletonOf:
    """``skeleton(folder, dtype=torch.float32)``"""

    return skeleton_of


@pytest.fixture
def tokens() -> torch.Tensor:
    """Token ids [N, T]."""
    return torch.randint(0, 256, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(11))
