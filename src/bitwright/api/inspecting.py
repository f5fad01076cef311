"""inspect(): what a model or a quantized folder holds, read from its headers alone."""

import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from bitwright.checkpoint.reader import Checkpoint
from bitwright.checkpoint.report_file import account_of
from bitwright.core.errors import CheckpointError
from bitwright.formats import QuantizedFolder, is_made_dense
from bitwright.model.config import architecture
from bitwright.model.discover import ROUTER, discover
from bitwright.model.source import open_checkpoint

PARTS_OF_A_WEIGHT = (
    "weight", "weight_packed", "weight_scale", "weight_zero_point", "outlier_index", "outlier_value", "outlier_count",
)  # fmt: skip
NOT_LINEAR = ("embed", "wte", "wpe", "norm")


@dataclass(frozen=True)
class LinearSize:
    """A linear on disk; ``bits_per_weight`` counts all that is stored for it, scales, zeros and outliers too.

    ``tile`` is how many output and input features share a scale, None where nothing is packed. A weight that is fused
    over experts has a ``shape`` of three numbers.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bits_per_weight: float
    tile: tuple[int, int] | None = None


@dataclass(frozen=True)
class Inspection:
    """What a folder holds. ``linears`` are the two-dimensional weights that are neither embedding nor norm nor a router
    of experts, and weights that are fused over experts, packed or not.

    ``bits_per_weight`` is over the quantized linears (all linears where none is), ``model_bits_per_weight`` over
    every parameter of the folder. ``scheme`` is what bitwright.json says, where there is one.
    """

    path: str
    architecture: str
    model_type: str
    blocks: int | None
    parameters: int
    weight_bytes: int
    quantization: str | None
    scheme: str | None
    bits_per_weight: float
    model_bits_per_weight: float
    linears: tuple[LinearSize, ...]


def inspect(path: Path | str) -> Inspection:
    """Reads the headers of a model folder; raises CheckpointError for one that is none or is damaged."""
    folder = Path(path)
    checkpoint = open_checkpoint(folder)
    linears, account = [*_linears(checkpoint), *_packed_by_input(checkpoint)], account_of(folder)
    quantized = [row for row in linears if row.dtype == "packed"] or linears
    parameters = _parameters(checkpoint, linears)
    return Inspection(
        path=str(folder),
        architecture=architecture(checkpoint.config),
        model_type=str(checkpoint.config.get("model_type", "?")),
        blocks=checkpoint.config.get("num_hidden_layers"),
        parameters=parameters,
        weight_bytes=checkpoint.total_bytes,
        quantization=_quantization(checkpoint.config),
        scheme=None if "scheme" not in account else str(account["scheme"]),
        bits_per_weight=_mean_bits(quantized),
        model_bits_per_weight=checkpoint.total_bytes * 8 / parameters if parameters else 0.0,
        linears=tuple(linears),
    )


def _linears(checkpoint: Checkpoint) -> list[LinearSize]:
    """Every linear, a packed one by its weight_packed."""
    shapes = {name: checkpoint.entry(name).shape for name in checkpoint.names}
    rules = discover(shapes, shapes, {})
    whole = {name for name, shape in shapes.items() if name.endswith(".weight") and len(shape) == 2}
    whole |= {weight.tensor for weight in rules.weights if weight.stacked}
    whole -= {kept.tensor for kept in rules.kept if kept.why == ROUTER}
    packed = {name for name in checkpoint.names if name.endswith(".weight_packed")}
    rows = [_linear(checkpoint, re.sub(r"\.weight(_packed)?$", "", name), name) for name in whole | packed]
    found = {row.name: row for row in rows if not any(part in row.name.lower() for part in NOT_LINEAR)}
    return sorted(
        found.values(), key=lambda row: [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", row.name)]
    )


def _packed_by_input(checkpoint: Checkpoint) -> list[LinearSize]:
    """The linears of a gptq or awq folder, whose words and scales go from input to output."""
    if not is_made_dense(checkpoint):
        return []
    found, rows = QuantizedFolder.open(checkpoint.folder), []
    for name in found.linears:
        out, in_ = found.shape(name)
        groups = checkpoint.entry(f"{name}.scales").shape[0]
        bits = 8 * sum(checkpoint.nbytes(part) for part in found.stored(name)) / max(1, out * in_)
        rows.append(LinearSize(name, (out, in_), "packed", bits, (1, in_ // max(1, groups))))
    return rows


def _linear(checkpoint: Checkpoint, name: str, tensor: str) -> LinearSize:
    """A linear, or a weight fused over experts; ``tensor`` has its weights, packed or in full."""
    packed = f"{name}.weight_packed" in checkpoint
    shape = _packed_shape(checkpoint, name) if packed else checkpoint.entry(tensor).shape
    stored = {tensor, *(part for leaf in PARTS_OF_A_WEIGHT if (part := f"{name}.{leaf}") in checkpoint)}
    bits = 8 * sum(checkpoint.nbytes(part) for part in stored) / max(1, prod(shape))
    dtype = "packed" if packed else str(checkpoint.entry(tensor).dtype).removeprefix("torch.")
    return LinearSize(name, tuple(shape), dtype, bits, _tile(checkpoint, name, shape) if packed else None)


def _tile(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The patch that shares a scale: by the number of scales along each dimension, or as the folder says it."""
    scale = f"{name}.weight_scale"
    counts = checkpoint.entry(scale).shape if scale in checkpoint else ()
    if len(counts) != len(shape) or not all(counts):
        return None
    cut = f"{name}.weight_tile"
    if cut in checkpoint and checkpoint.entry(cut).shape == (2,):
        rows, columns = checkpoint.read(cut).tolist()
        return int(rows), int(columns)
    return shape[-2] // counts[-2], shape[-1] // counts[-1]


def _packed_shape(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    """What weight_shape says, [O, I] or [E, A, B]. Raises CheckpointError where the packed words cannot be a weight of
    that shape."""
    words = checkpoint.entry(f"{name}.weight_packed").shape
    said = checkpoint.entry(f"{name}.weight_shape")
    if not said.dtype.is_floating_point and len(words) in (2, 3) and said.shape == (len(words),):
        shape = tuple(checkpoint.read(f"{name}.weight_shape").tolist())
        if shape[:-1] == words[:-1] and shape[-1] > 0:
            return shape
    raise CheckpointError(
        f"{checkpoint.folder}: {name}.weight_shape does not say the shape of {name}.weight_packed, which has "
        f"{words[-2] if len(words) > 1 else 0} rows; the folder is damaged, quantize the model again"
    )


def _parameters(checkpoint: Checkpoint, linears: list[LinearSize]) -> int:
    """Weights of packed linears by their shape; of everything else floating by its elements."""
    packed = {row.name for row in linears if row.dtype == "packed"}
    others = [n for n in checkpoint.names if n.rpartition(".")[0] not in packed]
    counted = sum(checkpoint.entry(n).elements for n in others if checkpoint.entry(n).dtype.is_floating_point)
    return counted + sum(prod(row.shape) for row in linears if row.name in packed)


def _mean_bits(rows: list[LinearSize]) -> float:
    weights = sum(prod(row.shape) for row in rows)
    return sum(row.bits_per_weight * prod(row.shape) for row in rows) / weights if weights else 0.0


def _quantization(config: dict[str, Any]) -> str | None:
    found = config.get("quantization_config")
    if not isinstance(found, dict):
        return None
    return " ".join(str(found[key]) for key in ("quant_method", "format") if key in found)
