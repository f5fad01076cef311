"""Weights in FP8 as DeepSeek, Qwen and others ship them: float8 codes, and one scale per block, channel or tensor.

    W ~ code * scale            computed in float32, rounded to bfloat16

``X.weight`` [O, I] is float8, ``X.weight_scale_inv`` (or ``X.weight_scale``) has a scale for each block of
``weight_block_size``, the last ones cut short: [ceil(O / 128), ceil(I / 128)]. If config.json says no blocks, there is
one scale, or one for each row. A weight that is fused over experts [E, O, I] has a dimension more, and so have its
scales. Scales of activations are not read.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.errors import CheckpointError, shown
from bitwright.core.panels import row_panels

METHOD, COMPRESSED, COMPRESSED_FP8 = "fp8", "compressed-tensors", "float-quantized"
CODES = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = ("_scale_inv", "_scale")
"""How the name of a weight's scales goes on after its own."""
DENSE = torch.bfloat16
OF_WEIGHTS = ("_scale_inv", "weight_scale")
"""Endings of the names of tensors that nothing else than scales of weights are called like."""
OF_ACTIVATIONS = re.compile(r"(^|[._])(input|activation|output|[qkv]|prob)_scale(_inv)?$")
BLOCK = "weight_block_size"


@dataclass(frozen=True)
class Float8Weight:
    """A weight [O, I] or [E, O, I] in FP8; ``block`` is the number of rows and columns that share a scale."""

    checkpoint: Checkpoint
    name: str
    scale: str
    block: tuple[int, int]
    dtype: torch.dtype = DENSE

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""
        return self.checkpoint.entry(self.name).shape

    def rows(self, start: int, stop: int) -> Float[Tensor, "R ..."]:
        """Dequantize rows, or experts, a panel at a time."""
        shape = self.shape
        *experts, _, columns = shape
        scale = self.checkpoint.read(self.scale).float()
        grid = scale.reshape(*experts, *self._counts())
        dense = torch.empty((stop - start, *shape[1:]), dtype=self.dtype, device="cpu")
        for part in row_panels(dense.shape):
            codes = self.checkpoint.read_slice(self.name, start + part.start, start + part.stop).float()
            if experts:
                spread = grid[start + part.start : start + part.stop].repeat_interleave(self.block[0], 1)
                spread = spread[:, : shape[1]]
            else:
                spread = grid[torch.arange(start + part.start, start + part.stop) // self.block[0]]
            dense[part] = codes.mul_(spread.repeat_interleave(self.block[1], -1)[..., :columns])
        return dense

    def pieces(self) -> Iterator[Tensor]:
        """The whole weight, some rows at a time."""
        for part in row_panels(self.shape):
            yield self.rows(part.start, part.stop)

    def _counts(self) -> tuple[int, int]:
        """The number of blocks along the output and along the input."""
        rows, columns = self.shape[-2:]
        return ceil(rows / self.block[0]), ceil(columns / self.block[1])


def is_float8(config: Any) -> bool:
    """Whether a quantization_config says that weights are FP8."""
    if not isinstance(config, dict):
        return False
    method = config.get("quant_method")
    return method == METHOD or (method == COMPRESSED and config.get("format") == COMPRESSED_FP8)


def float8_weights(checkpoint: Checkpoint, config: Mapping[str, Any]) -> tuple[dict[str, Float8Weight], set[str]]:
    """The FP8 weights of a checkpoint by their names, and the names of scales, which are no weights.

    Raises CheckpointError for a weight without scales, for scales that do not fit it, and for scales without a weight.
    """
    blocks, weights = _block(checkpoint, config), dict[str, Float8Weight]()
    for name in checkpoint.names:
        if checkpoint.entry(name).dtype in CODES:
            weights[name] = _weight(checkpoint, name, blocks)
    if not weights:
        raise CheckpointError(
            f"{checkpoint.folder}/config.json says that weights are FP8, and no tensor is; if they were dequantized, "
            "remove its quantization_config"
        )
    scales = {weight.scale for weight in weights.values()}
    _refuse_others(checkpoint, scales)
    return weights, scales | {name for name in checkpoint.names if OF_ACTIVATIONS.search(name)}


def describes_activations(checkpoint: Checkpoint, config: Mapping[str, Any]) -> bool:
    """Whether inputs of linears, or keys and values, are quantized too."""
    groups = config.get("config_groups")
    inside = groups.values() if isinstance(groups, dict) else ()
    described = any(isinstance(group, dict) and group.get("input_activations") for group in inside)
    named = config.get("activation_scheme") or config.get("kv_cache_scheme")
    return bool(described or named or any(map(OF_ACTIVATIONS.search, checkpoint.names)))


def has_blocks(config: Mapping[str, Any]) -> bool:
    """Whether each scale belongs to a block of a weight."""
    return _stated(config) is not None


def _stated(config: Mapping[str, Any]) -> Any:
    """The sizes of a block as config.json has them, unchecked; None if it has none."""
    block, groups = config.get(BLOCK), config.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        block = (weights.get("block_structure") if isinstance(weights, dict) else None) or block
    return block


def _block(checkpoint: Checkpoint, config: Mapping[str, Any]) -> tuple[int, int] | None:
    """The sizes of a block; None if there are none. Raises CheckpointError for sizes that cannot be."""
    block = _stated(config)
    if block is None:
        return None
    if not isinstance(block, list | tuple) or len(block) != 2 or not all(type(x) is int and x > 0 for x in block):
        raise CheckpointError(
            f"{checkpoint.folder}/config.json says {shown(block)} for {BLOCK}, not two sizes such as [128, 128]; "
            "compare it with the original repository's"
        )
    return block[0], block[1]


def _weight(checkpoint: Checkpoint, name: str, block: tuple[int, int] | None) -> Float8Weight:
    entry = checkpoint.entry(name)
    scale = next((f"{name}{end}" for end in SCALES if f"{name}{end}" in checkpoint), None)
    if scale is None:
        raise CheckpointError(
            f"{checkpoint.folder}: {name} is FP8 and has no scales: there is no tensor {name}{SCALES[0]}, nor "
            f"{name}{SCALES[1]}; the folder is damaged, download it again"
        )
    scales = checkpoint.entry(scale)
    if len(entry.shape) not in (2, 3) or 0 in entry.shape:
        raise CheckpointError(f"{checkpoint.folder}: {name} is FP8 of shape {list(entry.shape)}, which is no weight")
    if not scales.dtype.is_floating_point:
        kind = str(scales.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{checkpoint.folder}: {scale} is {kind}, and Bitwright reads FP8 whose scales are floating-point numbers; "
            "start from the full-precision model"
        )
    *experts, rows, columns = entry.shape
    candidates = [block] if block is not None else [(rows, columns), (1, columns)]
    for sizes in candidates:
        wanted = (*experts, ceil(rows / sizes[0]), ceil(columns / sizes[1]))
        if _alike(scales.shape, wanted):
            return Float8Weight(checkpoint, name, scale, sizes)
    wanted = (*experts, ceil(rows / candidates[0][0]), ceil(columns / candidates[0][1]))
    raise CheckpointError(
        f"{checkpoint.folder}: {scale} has shape {list(scales.shape)}, and {name} {list(entry.shape)} "
        + (f"in blocks of {block[0]} x {block[1]} " if block is not None else "without blocks ")
        + f"needs {list(wanted)}; weights and config.json do not belong together, download the folder again"
    )


def _alike(stored: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether scales have a shape, dimensions of 1 at the end left out or not."""
    return (
        stored == wanted
        or (prod(stored) == prod(wanted) and stored == wanted[: len(stored)])
        or (prod(stored) == prod(wanted) == 1)
    )


def _refuse_others(checkpoint: Checkpoint, scales: set[str]) -> None:
    """Raise CheckpointError for scales of a weight that is not there, or is not FP8."""
    for name in checkpoint.names:
        if name in scales or OF_ACTIVATIONS.search(name) or not name.endswith(OF_WEIGHTS):
            continue
        weight = name.removesuffix("_inv").removesuffix("_scale")
        kind = str(checkpoint.entry(weight).dtype).removeprefix("torch.") if weight in checkpoint else "not there"
        raise CheckpointError(
            f"{checkpoint.folder}: {name} are scales of a weight that is {kind}, not FP8, which is not read; the "
            "folder is damaged, or of another kind than its config.json says. Start from the full-precision model"
        )
