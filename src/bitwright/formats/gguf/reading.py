"""A GGUF file, whoever wrote it, looked at and decoded: a ``core.engine_file.EngineFile``.

Values come from the decoders of the gguf library, levels from ``blocks``.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, MODEL_ARCH_NAMES
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize

from bitwright.core.decoder import Decoder, OddConfigError, decoder_of
from bitwright.core.engine_file import EngineTensor, Levels, Rows, Shape, Wanted
from bitwright.core.errors import CheckpointError
from bitwright.formats.gguf.architecture import KNOWN, ROPE_FACTORS, Architecture, architecture
from bitwright.formats.gguf.blocks import BLOCK, KINDS, SCALES, unpacked
from bitwright.formats.gguf.header import Entry, Header, read_header
from bitwright.formats.gguf.settings import dimensions, lacks_factors, unlike
from bitwright.formats.gguf.weights import TOGETHER

PLAIN = {Kind.F32: np.float32, Kind.F16: np.float16, Kind.F64: np.float64}
BRAIN_EXPONENT = 0x7F80
"""The bits of bfloat16 that are all set in NaN and infinity."""
OUTPUT = "output.weight"
FACTORS = (ROPE_FACTORS, "rope_factors_long.weight", "rope_factors_short.weight")
FAMILIES = {str(MODEL_ARCH_NAMES[kind]): model_type for model_type, kind in reversed(KNOWN.items())}
"""GGUF's architectures that are known here, and the first ``model_type`` for each."""


def opened(path: Path) -> "GgufFile":
    """A GGUF file. Raises CheckpointError for one that is damaged, or a part of one."""
    header = read_header(path)
    parts = header.says.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        raise CheckpointError(
            f"{path}: is one of {parts} parts of a model; join them with llama-gguf-split --merge, and name the whole"
        )
    blocks = header.says.get(f"{header.says.get('general.architecture')}.block_count", 0)
    if not isinstance(blocks, int) or blocks > len(header.tensors):
        raise CheckpointError(f"{path}: says it has {blocks} blocks, in {len(header.tensors)} tensors; it is damaged")
    return GgufFile(header)


@dataclass(frozen=True)
class GgufFile:
    """A file whose header has been read; its data are mapped, not loaded."""

    header: Header

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self.header.path

    @cached_property
    def tensors(self) -> Mapping[str, EngineTensor]:
        """What it holds."""
        entries = self.header.tensors.items()
        return {name: EngineTensor(name, each.shape, each.kind.name, each.nbytes) for name, each in entries}

    @cached_property
    def unknown(self) -> str:
        """Why the architecture is not looked at; "" where it is."""
        return self._decoder if isinstance(self._decoder, str) else ""

    @cached_property
    def wanted(self) -> Wanted | None:
        """The tensors of the architecture; biases may be there."""
        if self._architecture is None:
            return None
        decoder = self._architecture.decoder
        factors = {name: self.tensors[name].shape for name in FACTORS if name in self.tensors}
        return Wanted(self._called(decoder.tensors), self._called(decoder.biases) | factors)

    @cached_property
    def names(self) -> Sequence[str]:
        """The folder's tensors."""
        return tuple(self._homes)

    @property
    def misfiled(self) -> str | None:
        """Whether the file ends where its last tensor does, or where the next one could begin."""
        end, length = self.header.nbytes, self.path.stat().st_size
        if end <= length <= -(-end // self.header.alignment) * self.header.alignment:
            return None
        return f"the last tensor ends at byte {end:,}, the file at {length:,}"

    def numbers(self, name: str) -> str | None:
        """Whether scales, or values that are stored as they are, are finite and not all zero."""
        entry, bad, any_scale = self.header.tensors[name], False, False
        if not self.is_read(name):
            return None
        shape = (int(np.prod(entry.shape[:-1])), entry.shape[-1])
        for rows in _panels(shape):
            numbers = _shared(self._raw(entry, rows, shape[0]), entry.kind)
            bad = bad or not (numbers.all() if numbers.dtype == bool else np.isfinite(numbers).all())
            any_scale = any_scale or bool(numbers.any())
        if bad:
            return "NaN or infinite"
        return "all its scales are zero" if entry.kind in SCALES and entry.nbytes and not any_scale else None

    def is_read(self, name: str) -> bool:
        """Whether it is known where the scales of the type lie."""
        kind = self.header.tensors[name].kind
        return kind in PLAIN or kind in SCALES or kind is Kind.BF16

    def checksums(self) -> None:
        """None: GGUF has none."""

    def bits(self) -> tuple[int, int]:
        """Of matrices in blocks of the model."""
        found = [each for each in self.tensors.values() if each.name.startswith("blk.") and len(each.shape) > 1]
        return 8 * sum(each.nbytes for each in found), sum(int(np.prod(each.shape)) for each in found)

    def unlike(self, config: Mapping[str, Any]) -> list[str]:
        """Metadata of both that say different things. Raises RecipeError for an architecture that GGUF has no words
        for."""
        into = architecture(config)
        return [*unlike(self.header, into), *lacks_factors(self.header, into)]

    def shape(self, name: str) -> Shape:
        """Of a tensor of the folder."""
        return self.header.tensors[self._homes[name]].shape

    def values(self, name: str) -> Iterator[tuple[Rows, torch.Tensor]]:
        """Through the library's decoders, rows of q and k turned back."""
        entry = self.header.tensors[self._homes[name]]
        for rows, data in self._parts(name, entry):
            try:
                made = dequantize(data, entry.kind)
            except NotImplementedError as error:
                raise CheckpointError(f"{self.path}: {entry.name} cannot be decoded: {error}") from None
            yield rows, torch.from_numpy(np.array(made, np.float32)).view(len(data), *entry.shape[1:])

    def levels(self, name: str) -> Iterator[tuple[Rows, Levels]]:
        """Of Q4_0, Q4_1 and Q8_0."""
        entry = self.header.tensors[self._homes[name]]
        if entry.kind in KINDS:
            for rows, data in self._parts(name, entry):
                yield rows, Levels(*unpacked(data, entry.kind), BLOCK)

    def _parts(self, name: str, entry: Entry) -> Iterator[tuple[Rows, Any]]:
        order = None if self._architecture is None else self._architecture.rotated_rows(name)
        if order is not None and len(order) != entry.shape[0]:
            order = None  # heads that do not make up these rows, which ``wanted`` tells: none can be turned back
        for rows in _panels((entry.shape[0], int(np.prod(entry.shape[1:])))):
            yield (rows if order is None else order[rows]), self._raw(entry, rows, entry.shape[0])

    def _raw(self, entry: Entry, rows: slice, of: int) -> Any:
        """Rows as they are stored, where the tensor has so many: numbers, or bytes of blocks."""
        each = entry.nbytes // of
        start, count = entry.start + rows.start * each, rows.stop - rows.start
        raw = np.memmap(self.path, np.uint8, "r", start, (count, each))
        return raw.view(PLAIN[entry.kind]) if entry.kind in PLAIN else raw

    @cached_property
    def _decoder(self) -> Decoder | str:
        """The decoder that the header describes; in words why it describes none."""
        says, named = self.header.says, str(self.header.says.get("general.architecture"))
        if named not in FAMILIES:
            return f"architecture {named} is not known here"
        if says.get(f"{named}.expert_count"):
            return "it has experts"
        config = dimensions(self.header) | {"tie_word_embeddings": OUTPUT not in self.header.tensors}
        try:
            return decoder_of(config | {"model_type": FAMILIES[named]})
        except OddConfigError as error:
            return f"its metadata do not say {error.key} as one number"

    @cached_property
    def _architecture(self) -> Architecture | None:
        return None if isinstance(self._decoder, str) else Architecture(KNOWN[self._decoder.model_type], self._decoder)

    @cached_property
    def _homes(self) -> dict[str, str]:
        """The file's names by the folder's, of what is there."""
        if self._architecture is None:
            return {}
        decoder = self._architecture.decoder
        named = {name: self._architecture.tensor(name) for name in {**decoder.tensors, **decoder.biases}}
        return {name: home for name, home in named.items() if home is not None and home in self.header.tensors}

    def _called(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """The same by the file's names."""
        assert self._architecture is not None
        named = {self._architecture.tensor(name): shape for name, shape in shapes.items()}
        return {name: shape for name, shape in named.items() if name is not None}


def _shared(raw: Any, kind: Kind) -> Any:
    """The numbers that a tensor stands or falls with; of bfloat16 whether each is one."""
    if kind in PLAIN:
        return raw
    if kind is Kind.BF16:
        return (raw.view(np.uint16) & BRAIN_EXPONENT) != BRAIN_EXPONENT
    start, count = SCALES[kind]
    block = raw.reshape(-1, GGML_QUANT_SIZES[kind][1])[:, start : start + 2 * count]
    return np.ascontiguousarray(block).view(np.float16)


def _panels(shape: tuple[int, int]) -> Iterator[slice]:
    at_once = max(1, TOGETHER // max(1, shape[1]))
    for start in range(0, shape[0], at_once):
        yield slice(start, min(start + at_once, shape[0]))
