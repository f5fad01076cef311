"""A quantized model and somebody's format: one file per format, each with read and write.

A format that others have written to is read through ``QuantizedFolder``, linear by linear.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.errors import CheckpointError, UserError
from bitwright.core.format import FileFormat, Reader, TensorFormat
from bitwright.core.grid import Tile
from bitwright.core.qtensor import QTensor
from bitwright.core.quantized import Described
from bitwright.core.registry import format_of, formats, names
from bitwright.core.tensor_bytes import digest

CONFIG = "quantization_config"
SHORT_BYTES = 2**20
"""A list of integers up to this size is read to see whether tensors fit together."""

_DAMAGE = (ValueError, TypeError, RuntimeError, IndexError, ZeroDivisionError)
"""Exceptions that arithmetic raises on tensors that do not fit together."""


@dataclass(frozen=True)
class QuantizedFolder:
    """A folder that somebody has quantized, or not: ``core.quantized.QuantizedModel``, from safetensors.

    ``format`` is None if nothing is quantized.
    """

    checkpoint: Checkpoint
    format: TensorFormat | None
    described: Described | None
    linears: tuple[str, ...]
    stacks: tuple[str, ...]
    passed: tuple[str, ...]

    @classmethod
    def open(cls, folder: Path) -> "QuantizedFolder":
        """Open a folder, quantized or not.

        Raises CheckpointError if it is not a folder, is damaged, or is quantized in a way that is not known.
        """
        checkpoint = Checkpoint.open(folder)
        config = checkpoint.config.get(CONFIG)
        if config is None:
            return cls(checkpoint, None, None, (), (), _in_order(checkpoint.names))
        format = _format_of(folder, config)
        described = _described(folder, format, config)
        weights = _quantized_weights(checkpoint, format, described)
        theirs = {f"{name}.{end}" for name in weights for end in format.leaves}
        stored = {name: [f"{name}.{x}" for x in format.leaves if f"{name}.{x}" in checkpoint] for name in weights}
        stacks = {name for name, tensors in stored.items() if len(checkpoint.entry(tensors[0]).shape) == 3}
        passed = [name for name in checkpoint.names if name not in theirs]
        return cls(
            checkpoint,
            format,
            described,
            _in_order(weights - stacks),
            _in_order(stacks),
            _in_order(passed),
        )

    @property
    def folder(self) -> Path:
        """The folder itself."""
        return self.checkpoint.folder

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json without its quantization_config."""
        return {key: value for key, value in self.checkpoint.config.items() if key != CONFIG}

    @property
    def format_name(self) -> str:
        """The format as a user writes it; "dense" if nothing is quantized."""
        return "dense" if self.format is None else self.format.name

    def read(self, linear: str) -> QTensor:
        """A quantized linear. Raises CheckpointError if its tensors do not fit together."""
        return self._read(linear, self._tensors(linear))

    def outline(self, linear: str) -> QTensor:
        """A quantized linear on the meta device: its grid, tile and dtypes, from headers and short lists of integers.

        Raises CheckpointError, as ``read`` does, for what these tell; neither codes nor scales are read.
        """
        return self._read(linear, {name: self._outlined(name) for name in self.stored(linear)})

    def _read(self, linear: str, tensors: Mapping[str, Tensor]) -> QTensor:
        reader, described = self._quantized()
        try:
            weight = reader.read(tensors, linear, described)
            rows, columns = self.shape(linear)
            if weight.shape != (rows, columns):
                raise ValueError(f"codes {list(weight.shape)}, a shape of {rows} x {columns}")
            check_tiles(weight, described.tile_of(linear))
        except CheckpointError as error:  # not damaged, but of a kind that is not read
            raise CheckpointError(f"{self.folder}: {error}") from error
        except (*_DAMAGE, KeyError, UserError) as error:
            raise _damaged(self.folder, linear, tensors, error) from error
        return weight

    def slices(self, stack: str) -> list[QTensor]:
        """A weight that is fused over experts, slice by slice. Raises CheckpointError as ``read`` does."""
        return self._slices(stack, self._tensors(stack))

    def expert(self, stack: str, number: int) -> QTensor:
        """One slice of a weight that is fused over experts, read alone if the format can. Raises CheckpointError."""
        reader, _ = self._quantized()
        if reader.cut is None:
            return self.slices(stack)[number]
        try:
            tensors = reader.cut(self.stored(stack), stack, number, self.checkpoint.read, self.checkpoint.read_slice)
        except (*_DAMAGE, KeyError) as error:
            raise _damaged(self.folder, stack, self._tensors(stack), error) from error
        return self._slices(stack, tensors)[0]

    def outline_slices(self, stack: str) -> list[QTensor]:
        """The slices of a weight that is fused over experts, as ``outline``."""
        return self._slices(stack, {name: self._outlined(name) for name in self.stored(stack)})

    def _slices(self, stack: str, tensors: Mapping[str, Tensor]) -> list[QTensor]:
        reader, described = self._quantized()
        if reader.read_stacked is None:
            raise CheckpointError(
                f"{self.folder}: {stack} is fused over experts, which Bitwright does not read of {self.format_name}"
            )
        try:
            slices = reader.read_stacked(tensors, stack, described.grid_of(stack))
            for part in slices:
                check_tiles(part, described.tile_of(stack))
        except (*_DAMAGE, KeyError, UserError) as error:
            raise _damaged(self.folder, stack, tensors, error) from error
        return slices

    def tensor(self, name: str) -> Tensor:
        """A tensor as it is stored."""
        return self.checkpoint.read(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a quantized linear [O, I] or stack [E, A, B], or of another tensor, mostly from its header.

        Raises CheckpointError for a tensor that is not there.
        """
        if not self.stored(name):
            return self.checkpoint.entry(name).shape
        reader, described = self._quantized()
        try:
            return reader.shape(
                lambda leaf: self.checkpoint.entry(f"{name}.{leaf}").shape,
                lambda leaf: self.checkpoint.read(f"{name}.{leaf}"),
                described.grid_of(name),
            )
        except _DAMAGE as error:
            raise _damaged(self.folder, name, self._tensors(name), error) from error

    def stored(self, linear: str) -> list[str]:
        """Names of the tensors that a quantized linear or stack is stored as."""
        leaves = () if self.format is None else self.format.leaves
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

    def _quantized(self) -> tuple[Reader, Described]:
        if self.format is None or self.format.reader is None or self.described is None:
            raise CheckpointError(f"{self.folder} is not quantized")
        return self.format.reader, self.described


def file_format_of(path: Path) -> FileFormat | None:
    """The format of an engine's own file or folder, None for the folder of a model."""
    if (path / "config.json").is_file():
        return None
    files = [format for format in formats() if isinstance(format, FileFormat) and format.recognizes(path)]
    return next((format for format in files if format.suffix == path.suffix), next(iter(files), None))


def refuse_engine_file(path: Path) -> None:
    """Raise CheckpointError for an engine's own file or folder in place of the folder of a model."""
    format = file_format_of(path)
    if format is None or (path.is_file() and path.suffix != format.suffix):
        return
    raise CheckpointError(
        f"{path}: is {format.what}, which Bitwright writes and verifies, but does not read as a model; name the folder "
        "that it was made of"
    )


def is_read(checkpoint: Checkpoint) -> bool:
    """Whether a folder is quantized in a format that is read."""
    config = checkpoint.config.get(CONFIG)
    format = _format_called(config.get("quant_method")) if isinstance(config, dict) else None
    return format is not None and format.reader is not None


def is_made_dense(checkpoint: Checkpoint) -> bool:
    """Whether a folder is loaded through its dequantized weights: the installed transformers does not load it right."""
    config = checkpoint.config.get(CONFIG)
    if not isinstance(config, dict):
        return False
    format = _format_called(config.get("quant_method"))
    return format is not None and not (format.loaded_by_transformers and format.wrongly_loaded(config) is None)


def check_tiles(weight: QTensor, configured: Tile | None) -> None:
    """Raise ValueError if the tiles of a weight are not as config.json has them, or lack a scale or zero point."""
    if not weight.scale.is_floating_point():
        raise ValueError(f"scales of dtype {weight.scale.dtype}")
    counts, scales = weight.tile.counts(weight.shape), tuple(weight.scale.shape)
    if scales != counts:
        raise ValueError(f"scales {list(scales)} for {counts[0]} x {counts[1]} tiles")
    if weight.zero is not None and tuple(weight.zero.shape) != scales:
        raise ValueError(f"zero points for {list(weight.zero.shape)} tiles, scales for {list(scales)}")
    stored, wanted = weight.tile.size(weight.shape), (configured or weight.tile).size(weight.shape)
    if any(size != min(want, most) for size, want, most in zip(stored, wanted, weight.shape, strict=True)):
        raise ValueError(f"{_tile(stored)} weights share a scale, config.json says {_tile(wanted)}")


def _tile(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _quantized_weights(checkpoint: Checkpoint, format: TensorFormat, described: Described) -> set[str]:
    """The weights with a tensor that only quantized weights have, even if their other tensors are missing.

    Not those that are there in full, with something beside them that happens to be called as a part of a quantized one.
    """
    ends = {leaf for leaf in format.leaves if leaf != "weight"}
    stems = {stem for stem, _, leaf in (name.rpartition(".") for name in checkpoint.names) if leaf in ends}
    if format.reader is not None and format.reader.codes_may_be_weight(described):
        return stems  # codes one to a byte are called like a weight in full
    return {stem for stem in stems if f"{stem}.weight" not in checkpoint or f"{stem}.{format.codes}" in checkpoint}


def _format_of(folder: Path, config: Any) -> TensorFormat:
    """The format that a quantization_config names. Raises CheckpointError for one that is not read."""
    format = _format_called(config.get("quant_method")) if isinstance(config, dict) else None
    if format is None:
        method = f"quant_method {config.get('quant_method')!r}" if isinstance(config, dict) else repr(config)
        readable = [entry.name for entry in formats() if isinstance(entry, TensorFormat) and entry.reader is not None]
        raise CheckpointError(
            f"{folder}: is quantized in a way that Bitwright does not read: config.json says {method}. It reads "
            f"{', '.join(readable)} folders"
        )
    return format


def _format_called(method: Any) -> TensorFormat | None:
    """The format that writes this quant_method and can be read; None if there is none."""
    format = format_of(method) if method in names("formats") else None
    return format if isinstance(format, TensorFormat) and format.reader is not None else None


def _described(folder: Path, format: TensorFormat, config: Any) -> Described:
    assert format.reader is not None
    try:
        return format.reader.described(config)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None


def _in_order(tensors: Any) -> tuple[str, ...]:
    """Names by the numbers in them: layer 2 before layer 10."""
    return tuple(sorted(tensors, key=lambda name: [(int(p), "") if p.isdecimal() else (-1, p) for p in _parts(name)]))


def _parts(name: str) -> Sequence[str]:
    return re.split(r"(\d+)", name)


def _damaged(folder: Path, linear: str, tensors: Mapping[str, Tensor], error: Exception) -> CheckpointError:
    shapes = ", ".join(f"{name.removeprefix(linear + '.')} {list(t.shape)}" for name, t in tensors.items())
    if isinstance(error, KeyError):
        return CheckpointError(
            f"{folder}: there is no tensor {error.args[0]}, of {linear} there are {shapes}; the folder is damaged, "
            "download or quantize it again"
        )
    return CheckpointError(
        f"{folder}: the tensors of {linear} do not fit together ({shapes}): {error}; the folder is damaged, download "
        "or quantize it again"
    )
