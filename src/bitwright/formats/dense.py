"""The weights as the codes stand for them, in the checkpoint's own dtype: any engine loads it, nothing is smaller.

For engines that know no quantized format, and to measure a scheme anywhere.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bitwright.core.format import TensorFormat
from bitwright.core.grid import Grid, Tile
from bitwright.core.qtensor import QTensor
from bitwright.core.quantized import WrittenModel
from bitwright.core.scheme import Scheme

HOLDS = "everything, dequantized"


def holds(grid: Grid, tile: Tile, outliers: bool) -> bool:
    """Whether the format has a place for such a linear: always, a weight is a number."""
    return True


def encode(name: str, weight: QTensor) -> dict[str, Tensor]:
    """The tensors to write for one linear."""
    return {f"{name}.weight": weight.dequantize()}


def decode(tensors: Mapping[str, Tensor], name: str, grid: Grid) -> Float[Tensor, "O I"]:
    """The weight [O, I] of one linear as written."""
    return tensors[f"{name}.weight"]


def encode_stacked(name: str, slices: Sequence[QTensor]) -> dict[str, Tensor]:
    """The tensor to write for a weight [E, A, B], called ``name`` as it is on disk, one QTensor [A, B] per slice."""
    return {name: torch.stack([q.dequantize() for q in slices])}


def decode_stacked(tensors: Mapping[str, Tensor], name: str, grid: Grid) -> Float[Tensor, "E A B"]:
    """The weight [E, A, B] of this name as written."""
    return tensors[name]


def stored_bytes(shape: tuple[int, ...], scheme: Scheme, dtype: torch.dtype) -> int:
    """Bytes of the tensors of one linear [O, I], or of a weight [E, A, B]."""
    return prod(shape) * dtype.itemsize


def quantization_config(model: WrittenModel) -> dict[str, Any] | None:
    """None: a dense folder is an ordinary model."""
    return None


FORMAT = TensorFormat(
    name="dense",
    summary="anything",
    holds=holds,
    holds_what=HOLDS,
    stored_bytes=stored_bytes,
    weights_only=True,
    leaves=("weight",),
    codes="weight",
    encode=encode,
    encode_stacked=encode_stacked,
    decode_stacked=decode_stacked,
    decode=decode,
    config=quantization_config,
    loaded_by_transformers=True,
)
