"""A GGUF file that anybody wrote, read and decoded: a ``core.engine_file.EngineFile``.

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
from bitwright.core.panels import row_panels
from bitwright.formats.gguf.architecture import BLOCK_PREFIX, KNOWN, OUTPUT, ROPE_FACTORS, Architecture, architecture
from bitwright.formats.gguf.blocks import BLOCK, KINDS, SCALES, unpacked
from bitwright.formats.gguf.header import Header, Stored, read_header
from bitwright.formats.gguf.possible import impossible
from bitwright.formats.gguf.settings import TOKENS, dimensions, lacks_factors, unlike

PLAIN = {Kind.F32: np.float32, Kind.F16: np.float16, Kind.F64: np.float64}
BRAIN_EXPONENT = 0x7F80
"""The bits of bfloat16 that are all set in NaN and infinity."""
FACTORS = (ROPE_FACTORS, "rope_factors_long.weight", "rope_factors_short.weight")
REQUIRED = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count")
"""The sizes that llama.cpp does not load a known architecture without; the first two, of any architecture."""
MERGES, TEMPLATE = "tokenizer.ggml.merges", "tokenizer.chat_template"
FAMILIES = {str(MODEL_ARCH_NAMES[kind]): model_type for model_type, kind in reversed(KNOWN.items())}
"""GGUF's architectures that are known here, and the first ``model_type`` for each."""


def opened(path: Path) -> "GgufFile":
    """Open a GGUF file. Raises CheckpointError for one that is damaged, or only a part of a model."""
    header = read_header(path)
    parts = header.metadata.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        raise CheckpointError(
            f"{path}: is one of {parts} parts of a model; join them with llama-gguf-split --merge, and name the whole"
        )
    named = header.metadata.get("general.architecture")
    if not header.tensors:
        raise CheckpointError(f"{path}: has no tensor at all; it is damaged, or it is a vocabulary alone")
    for key in REQUIRED if named in FAMILIES else REQUIRED[:2]:
        size = header.metadata.get(f"{named}.{key}", None if named in FAMILIES else 1)
        if size is None or (isinstance(size, int) and size < 1):
            raise CheckpointError(
                f"{path}: {named}.{key} is {'missing' if size is None else size}, and a model has at least 1; the file "
                "is damaged, write it again"
            )
    blocks = header.metadata.get(f"{named}.block_count", 0)
    if not isinstance(blocks, int) or blocks > len(header.tensors):
        raise CheckpointError(f"{path}: says it has {blocks} blocks, in {len(header.tensors)} tensors; it is damaged")
    return GgufFile(header)


@dataclass(frozen=True)
class GgufFile:
    """A file whose header has been read; its data are mapped, not loaded."""

    header: Header

    @property
    def path(self) -> Path:
        """The path of the file."""
        return self.header.path

    @cached_property
    def tensors(self) -> Mapping[str, EngineTensor]:
        """The tensors in the file."""
        stored = self.header.tensors.items()
        return {name: EngineTensor(name, tensor.shape, tensor.kind.name, tensor.nbytes) for name, tensor in stored}

    @cached_property
    def unknown(self) -> str:
        """The reason why the architecture is not looked at; "" if it is."""
        return self._decoder if isinstance(self._decoder, str) else ""

    @cached_property
    def wanted(self) -> Wanted | None:
        """The tensors that the architecture needs; biases and rotary factors are allowed."""
        if self._architecture is None:
            return None
        decoder = self._architecture.decoder
        factors = {name: self.tensors[name].shape for name in FACTORS if name in self.tensors}
        return Wanted(self._called(decoder.tensors), self._called(decoder.biases) | factors)

    @cached_property
    def names(self) -> Sequence[str]:
        """The folder's tensors that are in the file."""
        return tuple(self._homes)

    @property
    def misfiled(self) -> str | None:
        """The fault of a file that does not end where its last tensor does, or where the next one could begin."""
        end, length = self.header.nbytes, self.path.stat().st_size
        if end <= length <= -(-end // self.header.alignment) * self.header.alignment:
            return None
        return f"the last tensor ends at byte {end:,}, the file at {length:,}"

    def impossible(self) -> list[str]:
        """The metadata that llama.cpp cannot compute with, in words."""
        return impossible(self.header, self.header.metadata.get("general.architecture") in FAMILIES)

    @property
    def unread(self) -> str:
        """The texts in the metadata, which are not looked at."""
        kinds = {"tokens": TOKENS, "merges": MERGES, "chat template": TEMPLATE}
        return " and ".join(kind for kind, key in kinds.items() if key in self.header.metadata)

    def numbers(self, name: str) -> str | None:
        """The fault of scales, or of values that are stored as they are: not finite, or all zero."""
        entry, bad, any_scale = self.header.tensors[name], False, False
        if not self.is_read(name):
            return None
        shape = (int(np.prod(entry.shape[:-1])), entry.shape[-1])
        for rows in row_panels(shape):
            numbers = _shared(self._raw(entry, rows, shape[0]), entry.kind)
            bad = bad or not (numbers.all() if numbers.dtype == bool else np.isfinite(numbers).all())
            any_scale = any_scale or bool(numbers.any())
        if bad:
            return "NaN or infinite"
        return "all its scales are zero" if entry.kind in SCALES and entry.nbytes and not any_scale else None

    def is_read(self, name: str) -> bool:
        """Whether the place of the scales in the type's blocks is known."""
        kind = self.header.tensors[name].kind
        return kind in PLAIN or kind in SCALES or kind is Kind.BF16

    def checksums(self) -> None:
        """None: GGUF has none."""

    def bits(self) -> tuple[int, int]:
        """The bits stored for the matrices in the model's blocks, and the number of their weights."""
        inside = (tensor for name, tensor in self.tensors.items() if name.startswith(BLOCK_PREFIX))
        matrices = [tensor for tensor in inside if len(tensor.shape) > 1]
        return 8 * sum(tensor.nbytes for tensor in matrices), sum(int(np.prod(tensor.shape)) for tensor in matrices)

    def unlike(self, config: Mapping[str, Any]) -> list[str]:
        """The metadata that differ from a config.json. Raises RecipeError for an architecture that GGUF lacks."""
        into = architecture(config)
        return [*unlike(self.header, into), *lacks_factors(self.header, into)]

    def shape(self, name: str) -> Shape:
        """The shape of a tensor of the folder."""
        return self.header.tensors[self._homes[name]].shape

    def values(self, name: str) -> Iterator[tuple[Rows, torch.Tensor]]:
        """A tensor through the library's decoders, rows of q and k in the folder's order again."""
        entry = self.header.tensors[self._homes[name]]
        for rows, data in self._parts(name, entry):
            try:
                decoded = dequantize(data, entry.kind)
            except NotImplementedError as error:
                raise CheckpointError(f"{self.path}: {entry.name} cannot be decoded: {error}") from None
            yield rows, torch.from_numpy(np.array(decoded, np.float32)).view(len(data), *entry.shape[1:])

    def levels(self, name: str) -> Iterator[tuple[Rows, Levels]]:
        """The levels of a tensor of type Q4_0, Q4_1 or Q8_0."""
        entry = self.header.tensors[self._homes[name]]
        if entry.kind in KINDS:
            for rows, data in self._parts(name, entry):
                yield rows, Levels(*unpacked(data, entry.kind), BLOCK)

    def _parts(self, name: str, entry: Stored) -> Iterator[tuple[Rows, Any]]:
        order = None if self._architecture is None else self._architecture.rotated_rows(name)
        if order is not None and len(order) != entry.shape[0]:
            order = None  # heads that do not make up these rows, as ``wanted`` tells: no order can be undone
        for rows in row_panels(entry.shape):
            yield (rows if order is None else order[rows]), self._raw(entry, rows, entry.shape[0])

    def _raw(self, entry: Stored, rows: slice, count: int) -> Any:
        """Rows as they are stored, numbers or bytes of blocks; ``count`` is the number of all rows of the tensor."""
        width = entry.nbytes // count
        start, height = entry.start + rows.start * width, rows.stop - rows.start
        raw = np.memmap(self.path, np.uint8, "r", start, (height, width))
        return raw.view(PLAIN[entry.kind]) if entry.kind in PLAIN else raw

    @cached_property
    def _decoder(self) -> Decoder | str:
        """The decoder that the header describes; if it describes none, the reason in words."""
        metadata, named = self.header.metadata, str(self.header.metadata.get("general.architecture"))
        if named not in FAMILIES:
            return f"architecture {named} is not known here"
        if metadata.get(f"{named}.expert_count"):
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
        """The file's names of the tensors that it has, by the folder's names."""
        if self._architecture is None:
            return {}
        decoder = self._architecture.decoder
        named = {name: self._architecture.tensor(name) for name in {**decoder.tensors, **decoder.biases}}
        return {name: home for name, home in named.items() if home is not None and home in self.header.tensors}

    def _called(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Shapes by the file's names instead of the folder's."""
        assert self._architecture is not None
        named = {self._architecture.tensor(name): shape for name, shape in shapes.items()}
        return {name: shape for name, shape in named.items() if name is not None}


def _shared(raw: Any, kind: Kind) -> Any:
    """The scales of blocks, or the values of a plain tensor; for bfloat16, whether each value is finite."""
    if kind in PLAIN:
        return raw
    if kind is Kind.BF16:
        return (raw.view(np.uint16) & BRAIN_EXPONENT) != BRAIN_EXPONENT
    start, count = SCALES[kind]
    block = raw.reshape(-1, GGML_QUANT_SIZES[kind][1])[:, start : start + 2 * count]
    return np.ascontiguousarray(block).view(np.float16)
