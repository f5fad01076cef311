"""Calibration data for the tiny model."""

import pytest
import torch
from tests.streamed import block, streamed

SEQUENCES, LENGTH = 6, 20

__all__ = ["block", "streamed"]  # fixtures


@pytest.fixture
def tokens() -> torch.Tensor:
    """Token ids [N, T]."""
    return torch.randint(0, 256, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(11))
