"""inspect(): list what a model folder holds, original or quantized, from its headers alone."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from bitwright.api.looking_inside import BlockInside, look_inside
from bitwright.checkpoint.account_file import read_account
from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.scheme import Scheme
from bitwright.core.small_files import uncollected
from bitwright.formats import QuantizedFolder, is_read
from bitwright.model.config import architecture
from bitwright.model.discover import ROUTER, discover
from bitwright.model.source import Source, open_checkpoint

NOT_LINEAR = ("embed", "wte", "wpe", "norm")


@dataclass(frozen=True)
class LinearSize:
    """A linear on disk.

    ``bits_per_weight`` counts codes, scales, zeros and outliers. ``tile`` is the number of output and of input
    features that share a scale, and ``scheme`` what it says of the weight; both are None if the linear is not
    quantized. A weight that is fused over experts has a ``shape`` of three numbers.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bits_per_weight: float
    tile: tuple[int, int] | None = None
    scheme: str | None = None


@dataclass(frozen=True)
class Inspection:
    """The contents of a model folder.

    ``linears`` are the two-dimensional weights that are neither embedding nor norm nor a router of experts, and the
    weights that are fused over experts, quantized or not.

    ``bits_per_weight`` is that of the quantized linears together (of all linears if none is quantized),
    ``model_bits_per_weight`` that of all parameters of the folder. ``scheme`` comes from bitwright.json; it is None
    without that file. ``inside`` are the kinds of blocks, if they were asked for.
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
    inside: tuple[BlockInside, ...] = ()

    @property
    def schemes(self) -> dict[str | None, int]:
        """How many linears have each scheme, the most frequent first; None stands for those that are not quantized."""
        return dict(Counter(row.scheme for row in self.linears).most_common())


def inspect(path: Path | str, *, sites: bool = False) -> Inspection:
    """Read the headers of a model folder. Raises CheckpointError if it is no model folder, or is damaged.

    With ``sites``, one block of each kind of an original model is run too, to see which linears share an input and
    where channels can be scaled.
    """
    with uncollected():  # many tensors are many objects, all of which stay
        inspected = _inspected(Path(path))
    return replace(inspected, inside=look_inside(Source.open(Path(path), tokenizer=False))) if sites else inspected


def _inspected(folder: Path) -> Inspection:
    checkpoint = open_checkpoint(folder)
    folder = checkpoint.folder
    model = _quantized(checkpoint)
    packed = [] if model is None else [_packed(model, name) for name in (*model.linears, *model.stacks)]
    names = set(checkpoint.names if model is None else model.passed)
    linears = sorted([*packed, *_dense(checkpoint, names)], key=_in_order)
    parameters = _elements(checkpoint, names) + sum(prod(row.shape) for row in packed)
    account = read_account(folder)
    return Inspection(
        path=str(folder),
        architecture=architecture(checkpoint.config),
        model_type=str(checkpoint.config.get("model_type", "?")),
        blocks=checkpoint.config.get("num_hidden_layers"),
        parameters=parameters,
        weight_bytes=checkpoint.total_bytes,
        quantization=_quantization(checkpoint.config),
        scheme=None if account is None else account.scheme or None,
        bits_per_weight=_mean_bits(packed or linears),
        model_bits_per_weight=checkpoint.total_bytes * 8 / parameters if parameters else 0.0,
        linears=tuple(linears),
    )


def _quantized(checkpoint: Checkpoint) -> QuantizedFolder | None:
    """Open a quantized folder by its format; None if it is not quantized, or in a format that we do not read."""
    if not is_read(checkpoint):
        return None
    model = QuantizedFolder.open(checkpoint.folder)
    return model if model.linears or model.stacks else None


def _packed(model: QuantizedFolder, name: str) -> LinearSize:
    """A quantized linear [O, I], or a weight that is fused over experts [E, A, B]."""
    assert model.format is not None
    shape = model.shape(name)
    slices = model.outline_slices(name) if name in model.stacks else [model.outline(name)]
    first = slices[0]
    outliers = sum(0 if part.outlier_index is None else part.outlier_index.numel() for part in slices)
    scheme = Scheme(first.grid, first.tile)
    bits = model.format.stored_bits(shape, scheme, first.scale.dtype, outliers) / max(1, prod(shape))
    if (described := model.described) is not None:
        grids = (described.activations, described.kv)
        scheme = scheme.with_activations(*(None if grid is None else grid.bits for grid in grids))
    return LinearSize(name, tuple(shape), "packed", bits, first.tile.size(first.shape), str(scheme))


def _dense(checkpoint: Checkpoint, names: Collection[str]) -> Iterator[LinearSize]:
    """The linears among these tensors, which are not quantized."""
    shapes = {name: checkpoint.entry(name).shape for name in names}
    rules = discover(shapes, shapes, {})
    linears = {name for name, shape in shapes.items() if name.endswith(".weight") and len(shape) == 2}
    linears |= {weight.tensor for weight in rules.weights if weight.stacked}
    linears -= {kept.tensor for kept in rules.kept if kept.why == ROUTER}
    for tensor in linears:
        name = tensor.removesuffix(".weight")
        if not any(part in name.lower() for part in NOT_LINEAR):
            entry = checkpoint.entry(tensor)
            bits = 8 * entry.nbytes / max(1, prod(entry.shape))
            yield LinearSize(name, entry.shape, str(entry.dtype).removeprefix("torch."), bits)


def _in_order(row: LinearSize) -> list[tuple[int, str]]:
    """The sort key of a linear: its name, in which numbers count as numbers."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", row.name)]


def _elements(checkpoint: Checkpoint, names: Iterable[str]) -> int:
    """The number of parameters in these tensors."""
    entries = map(checkpoint.entry, names)
    return sum(entry.elements for entry in entries if entry.dtype.is_floating_point)


def _mean_bits(rows: list[LinearSize]) -> float:
    weights = sum(prod(row.shape) for row in rows)
    return sum(row.bits_per_weight * prod(row.shape) for row in rows) / weights if weights else 0.0


def _quantization(config: dict[str, Any]) -> str | None:
    described = config.get("quantization_config")
    if not isinstance(described, dict):
        return None
    return " ".join(str(described[key]) for key in ("quant_method", "format") if key in described)
