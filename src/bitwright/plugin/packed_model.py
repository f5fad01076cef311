"""A transformers model with packed linears: put in place, and held to what the folder says. Nothing is believed."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.errors import CheckpointError, SchemeError
from bitwright.core.scheme import Grid
from bitwright.formats.bitwright import Config, Integers
from bitwright.kernels.reference import PackedLinear
from bitwright.steps.activations import quantize_attention

AGAIN = "the folder is damaged: download it again, or quantize the model again"


def pack_linears(model: nn.Module, config: Config) -> dict[str, PackedLinear]:
    """Puts a packed linear, still empty, in the place of every linear that the config says is one.

    Returns them by name. Raises CheckpointError where config and model do not fit.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    kept = config.modules_to_not_convert
    unknown = sorted({*config.exceptions, *kept} - linears.keys())
    if unknown:
        raise CheckpointError(f"the quantization_config names {unknown[0]}, which is no linear of this model; {AGAIN}")
    packed = {name: _packed(name, linear, config) for name, linear in linears.items() if name not in kept}
    for name, module in packed.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)
    return packed


def _packed(name: str, linear: nn.Linear, config: Config) -> PackedLinear:
    shape, outliers = (linear.out_features, linear.in_features), config.outliers(name)
    if outliers > shape[0] * shape[1]:
        raise CheckpointError(f"the quantization_config says {outliers} outliers of {name} {list(shape)}; {AGAIN}")
    try:
        with linear.weight.device:
            return PackedLinear(
                shape,
                config.weights.grid,
                config.tile(name),
                config.dtype,
                outliers=outliers,
                bias=linear.bias,
                activations=_grid(config.activations),
            )
    except SchemeError as error:
        raise CheckpointError(f"the tile that the quantization_config says of {name}: {error}; {AGAIN}") from None


def check_headers(packed: Mapping[str, PackedLinear], folder: Path) -> None:
    """Refuses a folder whose tensors are not what its config calls for, before any is loaded. CheckpointError.

    Transformers itself would take what has another shape, and make up what is missing.
    """
    checkpoint = Checkpoint.open(folder)
    for name, wanted in _tensors(packed):
        if name not in checkpoint:
            raise CheckpointError(f"{folder} has no tensor {name}, which its quantization_config calls for; {AGAIN}")
        found = checkpoint.entry(name)
        if found.shape != tuple(wanted.shape) or found.dtype != wanted.dtype:
            raise CheckpointError(
                f"{folder}: {name} is {_said(found.dtype)} {list(found.shape)}, and its config calls for "
                f"{_said(wanted.dtype)} {list(wanted.shape)}; {AGAIN}"
            )


def check_values(model: nn.Module) -> None:
    """Refuses values that no writer writes: shapes that lie, scales that are no numbers, outliers outside the weight
    or out of order. CheckpointError."""
    for name, linear in _linears(model):
        shape = [linear.out_features, linear.in_features]
        if linear.weight_shape.tolist() != shape:
            raise CheckpointError(f"{name}.weight_shape says {linear.weight_shape.tolist()}, not {shape}; {AGAIN}")
        if not bool(linear.weight_scale.isfinite().all()):
            raise CheckpointError(f"{name}.weight_scale holds NaN or infinity; {AGAIN}")
        if linear.outlier_index is not None and linear.outlier_value is not None:
            index = linear.outlier_index.long()
            inside = int(index[0]) >= 0 and int(index[-1]) < shape[0] * shape[1]
            if not (inside and bool((index.diff() > 0).all()) and bool(linear.outlier_value.isfinite().all())):
                raise CheckpointError(f"{name}: outliers outside the weight, out of order, or no numbers; {AGAIN}")


def quantize_attention_of(model: nn.Module, config: Config) -> None:
    """Has queries, keys and values quantized as the config says."""
    quantize_attention(model, _grid(config.queries), _grid(config.keys_values))


def _linears(model: nn.Module) -> Iterator[tuple[str, PackedLinear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, PackedLinear))


def _tensors(packed: Mapping[str, PackedLinear]) -> Iterator[tuple[str, torch.Tensor]]:
    """What must be on disk: every buffer, in the dtype that it has there."""
    for name, linear in packed.items():
        yield from ((f"{name}.{leaf}", buffer) for leaf, buffer in linear.named_buffers())


def _grid(said: Integers | None) -> Grid | None:
    return None if said is None else said.grid


def _said(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
