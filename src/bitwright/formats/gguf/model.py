"""The tensors and metadata of a GGUF file, from a model; each tensor is made when its turn comes."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_VERSION, LlamaFileType
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from bitwright.core.convert import SquaredError
from bitwright.core.decoder import HEAD
from bitwright.core.errors import CheckpointError, RecipeError
from bitwright.core.format import QuantizedModel, WriteOptions
from bitwright.core.panels import row_panels
from bitwright.core.quantized import Difference
from bitwright.core.small_files import dumped
from bitwright.core.weight import NO_WEIGHTS
from bitwright.formats.gguf.architecture import BLOCK_PREFIX, EMBEDDING, NORM, OUTPUT, ROPE_FACTORS, Architecture
from bitwright.formats.gguf.base_file import Base
from bitwright.formats.gguf.blocks import BLOCK, nbytes_of, nearest, packed, valued
from bitwright.formats.gguf.file import Entry, Planned, count, text
from bitwright.formats.gguf.weights import held, kind_of

EMBEDDINGS = {"q8_0": Kind.Q8_0, "q4_0": Kind.Q4_0, "f16": Kind.F16}
OUTER = (EMBEDDING, OUTPUT)
FILE_TYPES = {
    Kind.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    Kind.Q4_1: LlamaFileType.MOSTLY_Q4_1,
    Kind.Q8_0: LlamaFileType.MOSTLY_Q8_0,
    Kind.F16: LlamaFileType.MOSTLY_F16,
    Kind.F32: LlamaFileType.ALL_F32,
}
MOST_LOST = {Kind.F16: 1e-4, Kind.Q8_0: 1e-3, Kind.Q4_0: 0.2}
"""The relative squared error above which numbers were too small for float16.

Rounding them to 11 bits costs less than 1e-6, to a block's 255 levels less than 32 / 254^2, and to 16 of them less than
32 / 16^2, whatever they are.
"""
PLACES = ("model", "calibration", "load_parameters", "base")
"""The keys of a recipe whose values are paths; their last part goes into the file."""


@dataclass
class Conversion:
    """A model on its way into a file; ``differences`` grow as its linears, and embeddings in blocks, are written."""

    model: QuantizedModel
    into: Architecture
    options: WriteOptions
    base: Base | None
    differences: list[Difference] = field(default_factory=list)

    def tensors(self) -> list[Planned]:
        """All tensors in the order of the file: rotary factors, embedding, blocks, norm, output layer.

        Raises CheckpointError for a tensor that the architecture has no place for.
        """
        return [*self._rope_factors(), *sorted([*self._linears(), *self._passed()], key=_position)]

    def require_whole(self) -> None:
        """Raise CheckpointError for a tensor that the architecture needs and the model lacks."""
        model = self.model
        there = {*model.passed, *(f"{linear}.weight" for linear in model.linears)}
        missing = sorted(self.into.decoder.tensors.keys() - there)
        if missing:
            raise CheckpointError(
                f"{model.folder}: {missing[0]} is not there, which architecture {self.into.name} of llama.cpp needs"
                f"{f', and {len(missing) - 1} more' * (len(missing) > 1)}; the folder is damaged, download or quantize "
                "it again"
            )

    def require_first(self) -> None:
        """Make the first linear and no other: if a file cannot hold one of them, it mostly cannot hold any.

        Raises RecipeError as ``_linear`` does, CheckpointError as ``tensors`` does.
        """
        self.tensors()
        if linears := sorted(self._linears(), key=_position):
            linears[0].make()

    def _linears(self) -> Iterator[Planned]:
        described = self.model.described
        for linear in self.model.linears:
            assert described is not None
            shape = self.model.shape(linear)
            kind = kind_of(described.grid_of(linear), shape[1])
            yield Planned(self._named(f"{linear}.weight"), shape, kind, partial(self._linear, linear, kind))

    def _passed(self) -> Iterator[Planned]:
        for name in self.model.passed:
            if name.endswith(NO_WEIGHTS) or (self.into.decoder.tied and name == f"{HEAD}.weight"):
                continue
            shape, named = self.model.shape(name), self._named(name)
            kind = Kind.F32 if len(shape) == 1 else self._outer_kind(shape) if named in OUTER else Kind.F16
            yield Planned(named, shape, kind, partial(self._unquantized, name, kind))

    def _outer_kind(self, shape: tuple[int, ...]) -> Kind:
        """The type of embedding or output layer."""
        asked = self.options.embeddings or ("f16" if self.model.described is None else "q8_0")
        return Kind.F16 if shape[-1] % BLOCK else EMBEDDINGS[asked]

    def _rope_factors(self) -> Iterator[Planned]:
        kept = {} if self.base is None else self.base.kept()
        factors = self.into.rope_factors()
        if factors is not None and ROPE_FACTORS not in kept:
            kept[ROPE_FACTORS] = factors.numpy()
        for name, data in kept.items():
            yield Planned(name, data.shape, Kind.F32, lambda data=data: data)  # type: ignore[misc]

    def _named(self, name: str) -> str:
        named = self.into.tensor(name)
        if named is None:
            raise CheckpointError(
                f"{self.model.folder}: architecture {self.into.name} of llama.cpp has no place for tensor {name} "
                f"{list(self.model.shape(name.removesuffix('.weight') if name not in self.model.passed else name))}"
            )
        return named

    def _linear(self, name: str, kind: Kind) -> np.ndarray[Any, Any]:
        """Make a quantized linear's blocks, and note what it lost."""
        linear = held(name, self.model.read(name), kind, self.options.lossy, self.into.rotated_rows(name))
        self.differences.append(linear.difference)
        return linear.data.view(np.float16) if kind is Kind.F16 else linear.data

    def _unquantized(self, name: str, kind: Kind) -> np.ndarray[Any, Any]:
        """Make a tensor that has no codes in the model; an embedding gets some here."""
        tensor, order = self.model.tensor(name), self.into.rotated_rows(name)
        if order is not None:
            tensor = tensor[order]
        if kind is Kind.F32:
            return tensor.float().numpy()
        out = np.empty((tensor.shape[0], nbytes_of((tensor.shape[1],), kind)), np.uint8)
        error = SquaredError()
        for rows in row_panels(tensor.shape):
            before = tensor[rows].float()
            out[rows], after = _rounded(name, before, kind)
            error.add(before, after)
        if error.relative > MOST_LOST[kind]:
            raise _too_small(name, tensor, kind, error.relative)
        if kind is not Kind.F16:
            self.differences.append(Difference(name.removesuffix(".weight"), False, error.relative, fresh=True))
        return out.view(np.float16) if kind is Kind.F16 else out

    def general(self) -> Iterator[Entry]:
        """Yield the metadata that name the model."""
        original = (self.options.account.get("recipe") or {}).get("model")
        yield text("general.type", "model")
        name = Path(original or self.model.folder).name or "model"
        yield text("general.name", name.encode("utf-8", "replace").decode("utf-8"))  # a path may have any bytes
        yield text("general.quantized_by", "Bitwright")

    def own(self, tensors: Sequence[Planned]) -> Iterator[Entry]:
        """Yield the metadata of the weights, which no base has: the type that most linears have, and the account."""
        linears = Counter(tensor.kind for tensor in tensors if len(tensor.shape) == 2 and tensor.name not in OUTER)
        most = max(linears, key=lambda kind: (linears[kind], -kind))
        yield count("general.quantization_version", GGML_QUANT_VERSION)
        yield count("general.file_type", FILE_TYPES[most])
        yield from _account(self.options.account)


def _rounded(name: str, rows: Tensor, kind: Kind) -> tuple[np.ndarray[Any, Any], Tensor]:
    """Round rows of a tensor to F16, or to nearest in blocks: their bytes, and the values that they have then."""
    half = rows.half()
    blocks = None if kind is Kind.F16 else nearest(rows, kind)
    if not (half if blocks is None else blocks[1]).isfinite().all():
        raise RecipeError(
            f"{name}: has numbers that {kind.name} does not hold, the largest {float(rows.abs().max()):g}; the "
            "checkpoint is damaged, or was never meant for 16 bits"
        )
    if blocks is None:
        return half.numpy().view(np.uint8), half.float()
    return packed(*blocks, kind), valued(*blocks)


def _too_small(name: str, tensor: Tensor, kind: Kind, error: float) -> RecipeError:
    return RecipeError(
        f"{name}: its numbers are too small for {kind.name}, the largest {float(tensor.abs().max()):g}: a relative "
        f"squared error of {error:.2g}. Float16 ends at 6e-8, and GGUF is written with nothing wider; leave the model "
        "as it is, or quantize it into a folder (--format compressed-tensors), which keeps the dtype of such tensors"
    )


def _account(account: Mapping[str, Any]) -> Iterator[Entry]:
    """Yield bitwright.json as one text, without the folders that things lay in."""
    if account:
        recipe = dict(account.get("recipe") or {})
        recipe |= {key: Path(recipe[key]).name for key in PLACES if recipe.get(key)}
        public = dict(account) | ({"recipe": recipe} if recipe else {})
        yield text("bitwright.account", dumped(public, separators=(",", ":")))


def _position(tensor: Planned) -> tuple[int, int]:
    """The place of a tensor in the file: embedding, blocks by number, norm, output layer."""
    if tensor.name.startswith(BLOCK_PREFIX):
        return (1, int(tensor.name.split(".")[1]))
    return ({EMBEDDING: 0, NORM: 2}.get(tensor.name, 3), 0)
