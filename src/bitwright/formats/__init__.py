"""A quantized model and somebody's format: one file per format, each with read and write.

A format that others have written to is read through ``QuantizedFolder``, linear by linear.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.errors import CheckpointError, UserError
from bitwright.core.qtensor import QTensor
from bitwright.core.quantized import Described
from bitwright.core.registry import find, names

CONFIG = "quantization_config"
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
        leaf = format.LEAVES[0]
        found = [name.removesuffix(f".{leaf}") for name in checkpoint.names if name.endswith(f".{leaf}")]
        theirs = {f"{name}.{end}" for name in found for end in format.LEAVES}
        stacks = {name for name in found if len(checkpoint.entry(f"{name}.{leaf}").shape) == 3}
        passed = [name for name in checkpoint.names if name not in theirs]
        return cls(
            checkpoint,
            format,
            described,
            _in_order(set(found) - stacks),
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
        format, described = self._quantized()
        tensors = self._tensors(linear)
        try:
            found: QTensor = format.read(tensors, linear, described)
            rows, columns = self.shape(linear)
            if found.shape != (rows, columns):
                raise ValueError(f"codes {list(found.shape)}, a shape of {rows} x {columns}")
            found.tile.counts(found.shape)
        except CheckpointError as error:  # not damaged, but of a kind that is not read
            raise CheckpointError(f"{self.folder}: {error}") from error
        except (KeyError, ValueError, RuntimeError, IndexError, ZeroDivisionError, UserError) as error:
            raise _damaged(self.folder, linear, tensors, error) from error
        return found

    def slices(self, stack: str) -> list[QTensor]:
        """A weight that is fused over experts, slice by slice. Raises CheckpointError as ``read`` does."""
        format, described = self._quantized()
        tensors = self._tensors(stack)
        try:
            found: list[QTensor] = format.read_stacked(tensors, stack, described.grid_of(stack))
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
        if f"{name}.{self._leaf}" not in self.checkpoint:
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

    def _tensors(self, linear: str) -> dict[str, Tensor]:
        return {name: self.checkpoint.read(name) for name in self.stored(linear)}

    @property
    def _leaf(self) -> str:
        return "" if self.format is None else str(self.format.LEAVES[0])

    def _quantized(self) -> tuple[ModuleType, Described]:
        if self.format is None or self.described is None:
            raise CheckpointError(f"{self.folder} is not quantized")
        return self.format, self.described


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
    return CheckpointError(
        f"{folder}: the tensors of {linear} do not fit together ({found}): {error}; the folder is damaged, download or "
        "quantize it again"
    )
