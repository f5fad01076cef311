"""An original that is quantized already, as a checkpoint whose weights are dequantized when they are read.

Block FP8, and every format that ``formats.QuantizedFolder`` reads. One weight is in memory at a time, or one expert of
a weight that is fused over experts.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol

import torch
from torch import Tensor

from bitwright.checkpoint.header import TensorEntry
from bitwright.checkpoint.ranges import Sink, Stored, is_finite, not_finite
from bitwright.checkpoint.reader import Checkpoint
from bitwright.checkpoint.untied import TIED, is_untied
from bitwright.core.errors import CheckpointError
from bitwright.core.tensor_bytes import memory_of
from bitwright.formats import CONFIG, QuantizedFolder, is_read
from bitwright.model.float8 import DENSE, describes_activations, float8_weights, has_blocks, is_float8
from bitwright.model.view import ModelView, with_stacks


class Packed(Protocol):
    """A weight that is stored quantized, and how it is read."""

    @property
    def name(self) -> str:
        """The first of the tensors that it is stored as."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the dequantized weight."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, [O, I] or [E, A, B]."""

    def rows(self, start: int, stop: int) -> Tensor:
        """Dequantize rows, or experts."""

    def pieces(self) -> Iterator[Tensor]:
        """The whole weight, in parts that follow one another."""


@dataclass(frozen=True)
class PackedLinear:
    """A linear in a format that is read, dequantized in the dtype of its scales."""

    folder: QuantizedFolder
    linear: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """The first of the tensors that it is stored as."""
        return self.folder.stored(self.linear)[0]

    def rows(self, start: int, stop: int) -> Tensor:
        """Dequantize rows; the whole linear is read."""
        return self.folder.read(self.linear).dequantize(self.dtype)[start:stop]

    def pieces(self) -> Iterator[Tensor]:
        """The whole linear at once."""
        yield self.rows(0, self.shape[0])


@dataclass(frozen=True)
class PackedStack:
    """A weight that is fused over experts, in a format that is read."""

    folder: QuantizedFolder
    stack: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """The first of the tensors that it is stored as."""
        return self.folder.stored(self.stack)[0]

    def rows(self, start: int, stop: int) -> Tensor:
        """Dequantize some experts, one after the other."""
        dense = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype, device="cpu")
        for number in range(start, stop):
            dense[number - start] = self.folder.expert(self.stack, number).dequantize(self.dtype)
        return dense

    def pieces(self) -> Iterator[Tensor]:
        """The experts, one after the other."""
        for number in range(self.shape[0]):
            yield self.rows(number, number + 1)


@dataclass(frozen=True)
class Dequantized(Stored):
    """A quantized weight on disk, which is copied dequantized."""

    packed: Packed

    def copy_to(self, file: Sink) -> None:
        """Append the dequantized weight's bytes to a file, a piece at a time."""
        for piece in self.packed.pieces():
            file.write(memory_of(piece.contiguous()))

    def forget(self) -> None:
        """Do nothing: the bytes on disk are not those of the weight."""


class DequantizedCheckpoint(Checkpoint):
    """A quantized folder, seen as the dense checkpoint that its weights stand for; `config` does not say otherwise.

    Its files are those of the folder, and so are fingerprint and times. `note` says how it was quantized.
    """

    def __init__(self, stored: Checkpoint, weights: Mapping[str, Packed], passed: Iterable[str], note: str) -> None:
        """Take `weights` by their dense names, and the names of all tensors that are not quantized."""
        config = {key: value for key, value in stored.config.items() if key != CONFIG}
        tensors = {name: name for name in passed} | {name: packed.name for name, packed in weights.items()}
        super().__init__(stored.folder, config, *stored.parts_of(tensors))
        self.note, self._stored, self._weights = note, stored, weights
        if self.config.get(TIED) is True and is_untied(self):
            self.config[TIED] = False

    @property
    def total_bytes(self) -> int:
        """The size of all tensors' data in bytes, as they are stored."""
        return self._stored.total_bytes

    def entry(self, name: str) -> TensorEntry:
        """The dtype and shape of a tensor, dequantized; its place is that of the first tensor it is stored as."""
        if (packed := self._weights.get(name)) is None:
            return super().entry(name)
        place = self._stored.entry(packed.name)
        return TensorEntry(name, packed.dtype, packed.shape, place.start, place.end)

    def stored(self, name: str) -> Stored:
        """A tensor on disk, which is copied dequantized."""
        if (packed := self._weights.get(name)) is None:
            return super().stored(name)
        return Dequantized(self._header(name), self.entry(name), packed)

    def is_finite(self, name: str) -> bool:
        """Whether a floating tensor is finite, dequantized."""
        packed = self._weights.get(name)
        return super().is_finite(name) if packed is None else all(map(is_finite, packed.pieces()))

    def _require_finite(self, name: str, state: "blake2b | None" = None) -> None:
        if (packed := self._weights.get(name)) is None:
            super()._require_finite(name, state)
            return
        nans = infinities = 0
        for piece in packed.pieces():
            if state is not None:
                state.update(memory_of(piece.contiguous()))
            if not is_finite(piece):
                nans, infinities = nans + int(piece.isnan().sum()), infinities + int(piece.isinf().sum())
        if nans or infinities:
            raise not_finite(self.file(name), self.entry(name), nans, infinities)

    def _read(
        self, name: str, shape: tuple[int, ...], skipped_rows: int, memory: torch.Tensor | None = None
    ) -> torch.Tensor:
        if (packed := self._weights.get(name)) is None:
            return super()._read(name, shape, skipped_rows, memory)
        return packed.rows(skipped_rows, skipped_rows + shape[0])


def as_dense(checkpoint: Checkpoint) -> Checkpoint:
    """Show a checkpoint with its weights dequantized; one that is not quantized as it is.

    Only headers and short lists of integers are read. Raises CheckpointError for what is damaged, and for what
    Bitwright does not read, the method named.
    """
    folder, config = checkpoint.folder, checkpoint.config.get(CONFIG)
    if config is None:
        return checkpoint
    if is_float8(config):
        return _of_float8(checkpoint, config)
    if not is_read(checkpoint):
        raise CheckpointError(f"{folder} is quantized already ({_method(config)}); start from the full-precision model")
    try:
        model = QuantizedFolder.open(folder)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder} is quantized already ({_method(config)}); start from the full-precision model. {error}"
        ) from error
    return _of_codes(model, config)


def _of_float8(checkpoint: Checkpoint, config: Mapping[str, Any]) -> DequantizedCheckpoint:
    weights, scales = float8_weights(checkpoint, config)
    passed = [name for name in checkpoint.names if name not in weights and name not in scales]
    block = next(iter(weights.values())).block
    sizes = f", blocks of {block[0]} x {block[1]}" if has_blocks(config) else ""
    note = f"the original is quantized already ({_method(config)}{sizes}): weights are dequantized to {_name(DENSE)}"
    if describes_activations(checkpoint, config):
        note += "; activations are not quantized as the original's are"
    if len(scales) > len(weights):
        note += ", and their scales are left out"
    return DequantizedCheckpoint(checkpoint, weights, passed, note)


def _of_codes(model: QuantizedFolder, config: Mapping[str, Any]) -> DequantizedCheckpoint:
    weights, bits = dict[str, Packed](), set[int]()
    for linear in model.linears:
        outline = model.outline(linear)
        weights[f"{linear}.weight"] = PackedLinear(model, linear, outline.shape, outline.scale.dtype)
        bits.add(outline.grid.bits)
    if not (model.linears or model.stacks):
        raise CheckpointError(
            f"{model.folder}/config.json says that it is quantized already ({_method(config)}), and no weight is; if "
            "this is the full-precision model, remove the quantization_config"
        )
    view = ModelView.of(model.checkpoint, with_stacks(model.stacks)) if model.stacks else None
    for stack in model.stacks:
        outline = model.outline_slices(stack)[0]
        name = stack if view is None else view.stack(stack)
        weights[name] = PackedStack(model, stack, model.shape(stack), outline.scale.dtype)
        bits.add(outline.grid.bits)
    widths = f", {' and '.join(map(str, sorted(bits)))} bits" if bits else ""
    note = (
        f"the original is quantized already ({_method(config)}{widths}), and weights that are quantized twice lose "
        "twice: start from the full-precision model if there is one"
    )
    if model.described is not None and (model.described.activations or model.described.kv):
        note += "; activations and KV cache are not quantized as the original's are"
    return DequantizedCheckpoint(model.checkpoint, weights, model.passed, note)


def _method(config: Any) -> str:
    """The quantization method in words."""
    unknown = "an unknown method"
    if not isinstance(config, dict):
        return unknown
    return " ".join(str(config[key]) for key in ("quant_method", "format") if config.get(key)) or unknown


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
