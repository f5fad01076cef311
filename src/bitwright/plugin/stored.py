"""Packed weights that become dense in a model: check them, because the folder is not trusted, and dequantize them."""

from collections.abc import Mapping
from math import ceil

import torch
from torch import Tensor

from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.errors import CheckpointError, SchemeError
from bitwright.core.grid import Zero
from bitwright.core.quantized import Described
from bitwright.formats import bitwright as format
from bitwright.formats.bitwright.config import Config
from bitwright.kernels.reference import WORD_BITS

AGAIN = "the folder is damaged: download it again, or quantize the model again"
LEAVES = (
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_minimum",
    "weight_shape",
    "weight_tile",
    "outlier_index",
    "outlier_value",
    "outlier_count",
)
Kind = tuple[torch.dtype, tuple[int, ...]]


def check_stored(checkpoint: Checkpoint, name: str, config: Config) -> None:
    """Raise CheckpointError if a packed weight's tensors do not match its shape and the config."""
    for leaf, wanted in _wanted(checkpoint, name, config).items():
        check_kind(checkpoint, f"{name}.{leaf}", wanted)


def check_kind(checkpoint: Checkpoint, tensor: str, wanted: Kind) -> None:
    """Raise CheckpointError if a tensor is missing, or has another dtype or shape than ``wanted``."""
    folder = checkpoint.folder
    if tensor not in checkpoint:
        raise CheckpointError(f"{folder} has no tensor {tensor}, which its quantization_config calls for; {AGAIN}")
    entry = checkpoint.entry(tensor)
    if (entry.dtype, entry.shape) != wanted:
        raise CheckpointError(
            f"{folder}: {tensor} is {_dtype_name(entry.dtype)} {list(entry.shape)}, and its config calls for "
            f"{_dtype_name(wanted[0])} {list(wanted[1])}; {AGAIN}"
        )


def check_numbers(name: str, scale: Tensor, index: Tensor | None, value: Tensor | None, size: int) -> None:
    """Raise CheckpointError for scales and outliers that are not finite, and for positions outside of the weight.

    ``index`` must also rise. ``size`` is the number of the weight's elements.
    """
    if not bool(scale.isfinite().all()):
        raise CheckpointError(f"{name}.weight_scale holds NaN or infinity; {AGAIN}")
    if index is None or value is None or not index.numel():
        return
    index = index.long()
    inside = int(index[0]) >= 0 and int(index[-1]) < size
    if not (inside and bool((index.diff() > 0).all()) and bool(value.isfinite().all())):
        raise CheckpointError(f"{name}: outliers outside the weight, out of order, or no numbers; {AGAIN}")


def check_tile(name: str, tile: Tensor | None, wanted: tuple[int, int]) -> None:
    """Raise CheckpointError if a stored tile is not the config's."""
    if tile is not None and tuple(tile.tolist()) != wanted:
        raise CheckpointError(f"{name}.weight_tile says {tile.tolist()}, not {list(wanted)}; {AGAIN}")


def dequantized(tensors: Mapping[str, Tensor], name: str, config: Config) -> Tensor:
    """Dequantize checked tensors to the weight [A, B], or [E, A, B], in the config's dtype.

    Raises CheckpointError for values that no writer writes.
    """
    *stack, rows, columns = tensors[f"{name}.weight_shape"].tolist()
    if f"{name}.outlier_count" in tensors:
        counts = tensors[f"{name}.outlier_count"]
        if int(counts.min()) < 0 or int(counts.sum()) != tensors[f"{name}.outlier_index"].numel():
            raise CheckpointError(f"{name}.outlier_count is not the number of its outliers; {AGAIN}")
    check_tile(name, tensors.get(f"{name}.weight_tile"), config.tile(name).size((rows, columns)))
    grid = config.grid(name)
    slices = format.read_stacked(tensors, name, grid) if stack else [format.read(tensors, name, Described(grid))]
    for q in slices:
        check_numbers(name, q.scale, q.outlier_index, q.outlier_value, rows * columns)
    dense = [q.dequantize() for q in slices]
    return torch.stack(dense) if stack else dense[0]


def _wanted(checkpoint: Checkpoint, name: str, config: Config) -> dict[str, Kind]:
    """The tensors that ``formats.bitwright`` writes for a weight of this shape, by the ends of their names."""
    shape, grid, outliers = _shape(checkpoint, name), config.grid(name), config.outliers(name)
    *stack, rows, columns = shape
    try:
        p, q = config.tile(name).counts((rows, columns))
    except SchemeError as error:
        raise CheckpointError(f"the tile that the quantization_config says of {name}: {error}; {AGAIN}") from None
    wanted: dict[str, Kind] = {
        "weight_packed": (torch.int32, (*stack, rows, ceil(columns * grid.bits / WORD_BITS))),
        "weight_scale": (config.dtype, (*stack, p, q)),
    }
    if config.tile(name).cut((rows, columns)):
        wanted["weight_tile"] = (torch.int64, (2,))
    if grid.zero is Zero.REAL:
        wanted["weight_minimum"] = (config.dtype, (*stack, p, q))
    elif not grid.symmetric:
        wanted["weight_zero_point"] = (torch.int32, (*stack, ceil(p * grid.bits / WORD_BITS), q))
    if outliers:
        wanted |= {"outlier_index": (torch.int32, (outliers,)), "outlier_value": (config.dtype, (outliers,))}
        wanted |= {"outlier_count": (torch.int64, tuple(stack))} if stack else {}
    return wanted


def _shape(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    """The weight's shape as its weight_shape tensor gives it, [A, B] or [E, A, B]."""
    tensor, dimensions = f"{name}.weight_shape", len(checkpoint.entry(f"{name}.weight_packed").shape)
    check_kind(checkpoint, tensor, (torch.int64, (3 if dimensions == 3 else 2,)))
    shape = checkpoint.read(tensor).tolist()
    if min(shape) < 1:
        raise CheckpointError(f"{checkpoint.folder}: {tensor} says {shape}; {AGAIN}")
    return tuple(shape)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
