"""A quantized folder, and what its weights must be: worked out from the original file, without Bitwright."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import Checkpoints
from tests.golden import affine

Quantized = Callable[..., Path]

LINEARS = tuple(
    f"model.layers.{layer}.{name}"
    for layer in range(2)
    for name in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
)


@dataclass(frozen=True)
class Case:
    """A run, and its scheme once more in numbers, so that nothing here depends on Bitwright reading it rightly."""

    scheme: str
    dtype: str = "bfloat16"
    tied: bool = False
    shards: bool = False
    quantize_lm_head: bool = False
    format: str = "compressed-tensors"
    bits: int = 4
    group: int = -1
    symmetric: bool = False

    def __str__(self) -> str:
        flags = [flag for flag in ("tied", "shards", "quantize_lm_head") if getattr(self, flag)]
        return "-".join([self.scheme, self.dtype, *flags, self.format])

    def model(self, tiny: Checkpoints) -> Path:
        """The folder of the original."""
        return tiny(self.dtype, tied=self.tied, shards=self.shards)

    def run(self, quantized: Quantized) -> Path:
        """The folder of the result."""
        asked: dict[str, Any] = {"format": self.format} if self.format != "compressed-tensors" else {}
        asked |= {"quantize_lm_head": True} if self.quantize_lm_head else {}
        return quantized(self.scheme, self.dtype, tied=self.tied, shards=self.shards, **asked)


@pytest.fixture(scope="session")
def quantized(tiny: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """``quantized(scheme, dtype=..., tied=..., format=...)``: a written folder, made once; nobody writes to it."""
    import bitwright

    made: dict[str, Path] = {}

    def folder(scheme: str, dtype: str = "bfloat16", tied: bool = False, shards: bool = False, **recipe: Any) -> Path:
        key = repr((scheme, dtype, tied, shards, sorted(recipe.items())))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("quantized") / "out"
            model = str(tiny(dtype, tied=tied, shards=shards))
            bitwright.quantize(bitwright.Recipe(model=model, scheme=scheme, **recipe), made[key])
        return made[key]

    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a model folder, whatever files it is split over."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def expected(weight: torch.Tensor, case: Case, scale: torch.Tensor | None = None) -> torch.Tensor:
    """``(code - zero) * scale`` of an original weight, in its own dtype.

    A float32 scale is taken from the file, once it is right to two units in the last place: the last digit depends on
    the order of two operations.
    """
    assert weight.dtype == getattr(torch, case.dtype)
    exact, tile = weight.double().numpy(), (1, case.group)
    golden = affine.quantize(exact, case.bits, case.symmetric, tile, case.dtype)
    if scale is not None:
        assert case.dtype == "float32"
        stored = scale.double().numpy()
        np.testing.assert_allclose(stored, golden.scale, rtol=2.0**-22)
        golden = affine.quantize(exact, case.bits, case.symmetric, tile, case.dtype, stored)
    return torch.from_numpy(golden.values(case.dtype)).to(weight.dtype)
