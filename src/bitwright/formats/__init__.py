"""A quantized model and somebody's format: one file per format, each with read and write.

A format that others have written to is read through ``QuantizedFolder``, linear by linear.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.errors import CheckpointError, UserError
from bitwright.core.qtensor import QTensor
from bitwright.core.quantized import Described
from bitwright.core.registry import find, names
from bitwright.core.scheme import Tile
from bitwright.core.tensor_bytes import digest

CONFIG = "quantization_config"
SHORT_BYTES = 2**20
"""A list of integers that has no more is read to see whether tensors fit together."""
PACKED = "pack-quantized"
"""The variant of compressed-tensors in which no codes are called ``weight``."""
CODES = ("weight_packed", "qweight")
"""How the names of packed codes end, whatever the format."""
MADE_DENSE = ("gptq", "awq")
"""Formats whose folders are read by Bitwright and not handed on to transformers."""
READABLE = "compressed-tensors (integer weights), bitwright, gptq and awq folders"


@dataclass(frozen=True)
class QuantizedFolder:
    """A folder that somebody has quantized, or not: ``core.quantized.QuantizedModel``, from safetensors.

    ``format`` is the module of its format, None where nothing is quantized.
    """

    checkpoint: Checkpoint
    format: ModuleType | None
    described: Described | None
    linears: tuple[str, ...]
    stacks: tuple[str, ...]
    passed: tuple[str, ...]

    @classmethod
    def open(cls, folder: Path) -> "QuantizedFolder":
        """Raises CheckpointError for a folder that is none, is damaged, or is quantized in a way that is not known."""
        checkpoint = Checkpoint.open(folder)
        said = checkpoint.config.get(CONFIG)
        if said is None:
            return cls(checkpoint, None, None, (), (), _in_order(checkpoint.names))
        format = _format_of(folder, said)
        described = _described(folder, format, said)
        found = _found(checkpoint, format, described)
        theirs = {f"{name}.{end}" for name in found for end in format.LEAVES}
        first = {name: [f"{name}.{leaf}" for leaf in format.LEAVES if f"{name}.{leaf}" in checkpoint] for name in found}
        stacks = {name for name, stored in first.items() if len(checkpoint.entry(stored[0]).shape) == 3}
        passed = [name for name in checkpoint.names if name not in theirs]
        return cls(
            checkpoint,
            format,
            described,
            _in_order(found - stacks),
            _in_order(stacks),
            _in_order(passed),
        )

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.checkpoint.folder

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json without its quantization_config."""
        return {key: value for key, value in self.checkpoint.config.items() if key != CONFIG}

    @property
    def format_name(self) -> str:
        """The format as a user writes it; "dense" where nothing is quantized."""
        return "dense" if self.format is None else self.format.__name__.rpartition(".")[2].replace("_", "-")

    def read(self, linear: str) -> QTensor:
        """A quantized linear. Raises CheckpointError where its tensors do not fit together."""
        return self._made(linear, self._tensors(linear))

    def look(self, linear: str) -> None:
        """Raises CheckpointError, as ``read`` does, for what dtypes, shapes and short lists of integers (the order of
        groups) tell of a linear; neither codes nor scales are read."""
        self._made(linear, {name: self._outlined(name) for name in self.stored(linear)})

    def _made(self, linear: str, tensors: Mapping[str, Tensor]) -> QTensor:
        format, described = self._quantized()
        try:
            found: QTensor = format.read(tensors, linear, described)
            rows, columns = self.shape(linear)
            if found.shape != (rows, columns):
                raise ValueError(f"codes {list(found.shape)}, a shape of {rows} x {columns}")
            check_tiles(found, described.tile_of(linear))
        except CheckpointError as error:  # not damaged, but of a kind that is not read
            raise CheckpointError(f"{self.folder}: {error}") from error
        except (KeyError, ValueError, RuntimeError, IndexError, ZeroDivisionError, UserError) as error:
            raise _damaged(self.folder, linear, tensors, error) from error
        return found

    def slices(self, stack: str) -> list[QTensor]:
        """A weight that is fused over experts, slice by slice. Raises CheckpointError as ``read`` does."""
        format, described = self._quantized()
        tensors = self._tensors(stack)
        if not hasattr(format, "read_stacked"):
            raise CheckpointError(
                f"{self.folder}: {stack} is fused over experts, which Bitwright does not read of {self.format_name}"
            )
        try:
            found: list[QTensor] = format.read_stacked(tensors, stack, described.grid_of(stack))
            for part in found:
                check_tiles(part, described.tile_of(stack))
        except (KeyError, ValueError, RuntimeError, IndexError, ZeroDivisionError, UserError) as error:
            raise _damaged(self.folder, stack, tensors, error) from error
        return found

    def tensor(self, name: str) -> Tensor:
        """A tensor as it is stored."""
        return self.checkpoint.read(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a quantized linear [O, I] or stack [E, A, B], or of another tensor; little more than its header is read.

        Raises CheckpointError for a tensor that is not there.
        """
        if not self.stored(name):
            return self.checkpoint.entry(name).shape
        format, described = self._quantized()
        try:
            shape: tuple[int, ...] = format.shape(
                lambda leaf: self.checkpoint.entry(f"{name}.{leaf}").shape,
                lambda leaf: self.checkpoint.read(f"{name}.{leaf}"),
                described.grid_of(name),
            )
        except (ValueError, RuntimeError, IndexError, ZeroDivisionError) as error:
            raise _damaged(self.folder, name, self._tensors(name), error) from error
        return shape

    def stored(self, linear: str) -> list[str]:
        """Names of the tensors that a quantized linear or stack is stored as."""
        leaves = () if self.format is None else self.format.LEAVES
        return [name for leaf in leaves if (name := f"{linear}.{leaf}") in self.checkpoint]

    def digest(self, linear: str) -> str:
        """``core.digest`` of the tensors that a quantized linear or stack is stored as."""
        return digest(self._tensors(linear))

    def _tensors(self, linear: str) -> dict[str, Tensor]:
        return {name: self.checkpoint.read(name) for name in self.stored(linear)}

    def _outlined(self, name: str) -> Tensor:
        """A tensor without its data, which no format needs to tell whether it fits; a short list of integers whole."""
        entry = self.checkpoint.entry(name)
        if len(entry.shape) == 1 and not entry.dtype.is_floating_point and entry.nbytes <= SHORT_BYTES:
            return self.checkpoint.read(name)
        return torch.empty(entry.shape, dtype=entry.dtype, device="meta")

    def _quantized(self) -> tuple[ModuleType, Described]:
        if self.format is None or self.described is None:
            raise CheckpointError(f"{self.folder} is not quantized")
        return self.format, self.described


def is_made_dense(checkpoint: Checkpoint) -> bool:
    """Whether a folder is loaded through its dequantized weights."""
    said = checkpoint.config.get(CONFIG)
    return isinstance(said, dict) and said.get("quant_method") in MADE_DENSE


def check_tiles(weight: QTensor, said: Tile | None) -> None:
    """Raises ValueError where scales and zero points of a weight are not one for each tile, or its tiles are not those
    that config.json names."""
    if not weight.scale.is_floating_point():
        raise ValueError(f"scales of dtype {weight.scale.dtype}")
    counts, scales = weight.tile.counts(weight.shape), tuple(weight.scale.shape)
    if scales != counts:
        raise ValueError(f"scales {list(scales)} for {counts[0]} x {counts[1]} tiles")
    if weight.zero is not None and tuple(weight.zero.shape) != scales:
        raise ValueError(f"zero points for {list(weight.zero.shape)} tiles, scales for {list(scales)}")
    found, wanted = weight.tile.size(weight.shape), (said or weight.tile).size(weight.shape)
    if any(one != min(other, most) for one, other, most in zip(found, wanted, weight.shape, strict=True)):
        raise ValueError(f"{_tile(found)} weights share a scale, config.json says {_tile(wanted)}")


def _tile(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _found(checkpoint: Checkpoint, format: ModuleType, described: Described) -> set[str]:
    """The weights of which a tensor is there that no other weight has: one that is not whole is seen all the same.

    Not those that are there in full, with something beside them that happens to be called as a part of a quantized one.
    """
    ends = {leaf for leaf in format.LEAVES if leaf != "weight"}
    stems = {stem for stem, _, leaf in (name.rpartition(".") for name in checkpoint.names) if leaf in ends}
    if "weight" in format.LEAVES and described.variant != PACKED:
        return stems  # codes one to a byte are called like a weight in full
    in_full = {stem for stem in stems if f"{stem}.weight" in checkpoint}
    return {stem for stem in stems if stem not in in_full or any(f"{stem}.{leaf}" in checkpoint for leaf in CODES)}


def _format_of(folder: Path, said: Any) -> ModuleType:
    """The module for what a quantization_config calls itself."""
    method = said.get("quant_method") if isinstance(said, dict) else None
    if method not in names("formats") or not hasattr(find("formats", str(method)), "described"):
        found = f"quant_method {method!r}" if isinstance(said, dict) else repr(said)
        raise CheckpointError(
            f"{folder}: is quantized in a way that Bitwright does not read: config.json says {found}. It reads "
            f"{READABLE}"
        )
    return find("formats", str(method))


def _described(folder: Path, format: ModuleType, said: Any) -> Described:
    try:
        found: Described = format.described(said)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    return found


def _in_order(found: Any) -> tuple[str, ...]:
    """Names by the numbers in them: layer 2 before layer 10."""
    return tuple(sorted(found, key=lambda name: [(int(p), "") if p.isdecimal() else (-1, p) for p in _parts(name)]))


def _parts(name: str) -> Sequence[str]:
    return re.split(r"(\d+)", name)


def _damaged(folder: Path, linear: str, tensors: Mapping[str, Tensor], error: Exception) -> CheckpointError:
    found = ", ".join(f"{name.removeprefix(linear + '.')} {list(t.shape)}" for name, t in tensors.items())
    if isinstance(error, KeyError):
        return CheckpointError(
            f"{folder}: there is no tensor {error.args[0]}, of {linear} there are {found}; the folder is damaged, "
            "download or quantize it again"
        )
    return CheckpointError(
        f"{folder}: the tensors of {linear} do not fit together ({found}): {error}; the folder is damaged, download or "
        "quantize it again"
    )
