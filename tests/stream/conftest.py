"""The tiny model as the stream sees it, and as transformers does."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from bitwright.model.source import Source
from bitwright.stream.skeleton import Skeleton

SEQUENCES, LENGTH = 6, 20

SkeletonOf = Callable[..., Skeleton]


@pytest.fixture
def skeleton() -> SkeletonOf:
    """``skeleton(folder, dtype=torch.float32)``"""

    def of(folder: Path, dtype: torch.dtype = torch.float32) -> Skeleton:
        source = Source.open(folder)
        return Skeleton(source.checkpoint, source.config, source.family, dtype, torch.device("cpu"))

    return of


@pytest.fixture
def tokens() -> torch.Tensor:
    """Token ids [N, T]."""
    return torch.randint(0, 256, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(11))


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model as transformers loads it."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval()
