"""A quantized model as the tensors and metadata of a GGUF file, each tensor made when its turn comes."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_VERSION, LlamaFileType
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from bitwright.core.decoder import HEAD
from bitwright.core.errors import CheckpointError, RecipeError
from bitwright.core.format import QuantizedModel, WriteOptions
from bitwright.core.quantized import Difference
from bitwright.core.weight import NO_WEIGHTS
from bitwright.formats.gguf.architecture import ROPE_FACTORS, Architecture
from bitwright.formats.gguf.base_file import Base
from bitwright.formats.gguf.blocks import BLOCK, nbytes_of, nearest, packed, valued
from bitwright.formats.gguf.entries import Entry, count, text
from bitwright.formats.gguf.file import Planned
from bitwright.formats.gguf.weights import TOGETHER, held, kind_of

EMBEDDINGS = {"q8_0": Kind.Q8_0, "q4_0": Kind.Q4_0, "f16": Kind.F16}
OUTER = ("token_embd.weight", "output.weight")
FILE_TYPES = {
    Kind.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    Kind.Q4_1: LlamaFileType.MOSTLY_Q4_1,
    Kind.Q8_0: LlamaFileType.MOSTLY_Q8_0,
    Kind.F16: LlamaFileType.MOSTLY_F16,
    Kind.F32: LlamaFileType.ALL_F32,
}
MOST_LOST = {Kind.F16: 1e-4, Kind.Q8_0: 1e-3, Kind.Q4_0: 0.2}
"""The relative squared error above which numbers were too small for float16: rounding them to 11 bits costs less than
1e-6, to a block's 255 levels less than 32 / 254^2, and to 16 of them less than 32 / 16^2, whatever they are."""
PLACES = ("model", "calibration", "load_parameters", "base")
"""What of a recipe are paths: their last part is what is told."""


@dataclass
class Conversion:
    """A model on its way into a file; ``differences`` grow as its linears are written, and embeddings in blocks."""

    model: QuantizedModel
    into: Architecture
    options: WriteOptions
    base: Base | None
    differences: list[Difference] = field(default_factory=list)

    def tensors(self) -> list[Planned]:
        """All tensors in the order of the file: embedding, blocks, norm, output layer; rotary factors first.

        Raises CheckpointError for a tensor that the architecture has no place for.
        """
        found = [*self._linears(), *self._passed()]
        found.sort(key=lambda each: _position(each.name))
        return [*self._rope_factors(), *found]

    def require_whole(self) -> None:
        """Raises CheckpointError for a tensor that the architecture needs and the model lacks."""
        model = self.model
        there = {*model.passed, *(f"{linear}.weight" for linear in model.linears)}
        missing = sorted(self.into.decoder.tensors.keys() - there)
        if missing:
            raise CheckpointError(
                f"{model.folder}: {missing[0]} is not there, which architecture {self.into.name} of llama.cpp needs"
                f"{f', and {len(missing) - 1} more' * (len(missing) > 1)}; the folder is damaged, download or quantize "
                "it again"
            )

    def require_one(self) -> None:
        """Makes one linear, and none of the rest: what the file does not hold is mostly held by none of them.

        Raises RecipeError as ``linear``, CheckpointError as ``tensors``.
        """
        made = (each.make for each in self.tensors() if isinstance(each.make, _Linear))
        if (first := next(made, None)) is not None:
            first()

    def _linears(self) -> Iterator[Planned]:
        described = self.model.described
        for linear in self.model.linears:
            assert described is not None
            shape = self.model.shape(linear)
            kind = kind_of(described.grid_of(linear), shape[1])
            yield Planned(self._named(f"{linear}.weight"), shape, kind, _Linear(self, linear, kind))

    def _passed(self) -> Iterator[Planned]:
        for name in self.model.passed:
            if name.endswith(NO_WEIGHTS) or (self.into.decoder.tied and name == f"{HEAD}.weight"):
                continue
            shape, named = self.model.shape(name), self._named(name)
            kind = Kind.F32 if len(shape) == 1 else self._outer_kind(shape) if named in OUTER else Kind.F16
            yield Planned(named, shape, kind, _Passed(self, name, kind))

    def _outer_kind(self, shape: tuple[int, ...]) -> Kind:
        """Of embedding and output layer."""
        asked = self.options.embeddings or ("f16" if self.model.described is None else "q8_0")
        return Kind.F16 if shape[-1] % BLOCK else EMBEDDINGS[asked]

    def _rope_factors(self) -> Iterator[Planned]:
        kept = {} if self.base is None else self.base.kept()
        made = self.into.rope_factors()
        if made is not None and ROPE_FACTORS not in kept:
            kept[ROPE_FACTORS] = made.numpy()
        for name, data in kept.items():
            yield Planned(name, data.shape, Kind.F32, lambda data=data: data)  # type: ignore[misc]

    def _named(self, name: str) -> str:
        found = self.into.tensor(name)
        if found is None:
            raise CheckpointError(
                f"{self.model.folder}: architecture {self.into.name} of llama.cpp has no place for tensor {name} "
                f"{list(self.model.shape(name.removesuffix('.weight') if name not in self.model.passed else name))}"
            )
        return found

    def linear(self, name: str, kind: Kind) -> np.ndarray[Any, Any]:
        """A quantized linear's blocks; what it lost is noted."""
        found = held(name, self.model.read(name), kind, self.options.lossy, self.into.rotated_rows(name))
        self.differences.append(found.difference)
        return found.data.view(np.float16) if kind is Kind.F16 else found.data

    def other(self, name: str, kind: Kind) -> np.ndarray[Any, Any]:
        """A tensor that is not quantized, or an embedding."""
        tensor, order = self.model.tensor(name), self.into.rotated_rows(name)
        if order is not None:
            tensor = tensor[order]
        if kind is Kind.F32:
            return tensor.float().numpy()
        out = np.empty((tensor.shape[0], nbytes_of((tensor.shape[1],), kind)), np.uint8)
        at_once = max(1, TOGETHER // tensor.shape[1])
        lost = size = 0.0
        for start in range(0, len(tensor), at_once):
            rows = tensor[start : start + at_once].float()
            out[start : start + at_once], after = _rounded(name, rows, kind)
            lost += float((after - rows).double().square().sum())
            size += float(rows.double().square().sum())
        error = lost / size if size else 0.0
        if error > MOST_LOST[kind]:
            raise _too_small(name, tensor, kind, error)
        if kind is not Kind.F16:
            self.differences.append(Difference(name.removesuffix(".weight"), False, error, fresh=True))
        return out.view(np.float16) if kind is Kind.F16 else out

    def general(self) -> Iterator[Entry]:
        """What the file is called."""
        made_of = (self.options.account.get("recipe") or {}).get("model")
        yield text("general.type", "model")
        yield text("general.name", Path(made_of or self.model.folder).name or "model")
        yield text("general.quantized_by", "Bitwright")

    def own(self, tensors: Sequence[Planned]) -> Iterator[Entry]:
        """What is said of the weights, whoever said the rest: the type that most linears have, and the account."""
        linears = Counter(each.kind for each in tensors if len(each.shape) == 2 and each.name not in OUTER)
        most = max(linears, key=lambda kind: (linears[kind], -kind))
        yield count("general.quantization_version", GGML_QUANT_VERSION)
        yield count("general.file_type", FILE_TYPES[most])
        yield from _account(self.options.account)


@dataclass(frozen=True)
class _Linear:
    conversion: Conversion
    name: str
    kind: Kind

    def __call__(self) -> np.ndarray[Any, Any]:
        return self.conversion.linear(self.name, self.kind)


@dataclass(frozen=True)
class _Passed:
    conversion: Conversion
    name: str
    kind: Kind

    def __call__(self) -> np.ndarray[Any, Any]:
        return self.conversion.other(self.name, self.kind)


def _rounded(name: str, rows: Tensor, kind: Kind) -> tuple[np.ndarray[Any, Any], Tensor]:
    """Rows of a tensor as F16, or to nearest in blocks; and the values that they have then."""
    half = rows.half()
    found = None if kind is Kind.F16 else nearest(rows, kind)
    if not (half if found is None else found[1]).isfinite().all():
        raise RecipeError(
            f"{name}: has numbers that {kind.name} does not hold, the largest {float(rows.abs().max()):g}; the "
            "checkpoint is damaged, or was never meant for 16 bits"
        )
    if found is None:
        return half.numpy().view(np.uint8), half.float()
    return packed(*found, kind), valued(*found)


def _too_small(name: str, tensor: Tensor, kind: Kind, error: float) -> RecipeError:
    return RecipeError(
        f"{name}: its numbers are too small for {kind.name}, the largest {float(tensor.abs().max()):g}: a relative "
        f"squared error of {error:.2g}. Float16 ends at 6e-8, and GGUF is written with nothing wider; leave the model "
        "as it is, or quantize it into a folder (--format compressed-tensors), which keeps the dtype of such tensors"
    )


def _account(account: Mapping[str, Any]) -> Iterator[Entry]:
    """bitwright.json as one text, without where things lay."""
    if account:
        recipe = dict(account.get("recipe") or {})
        recipe |= {key: Path(recipe[key]).name for key in PLACES if recipe.get(key)}
        told = dict(account) | ({"recipe": recipe} if recipe else {})
        yield text("bitwright.account", json.dumps(told, ensure_ascii=False, separators=(",", ":")))


def _position(name: str) -> tuple[int, int]:
    """Embedding, blocks by number, then norm and output layer."""
    if name.startswith("blk."):
        return (1, int(name.split(".")[1]))
    return ({"token_embd.weight": 0, "output_norm.weight": 2}.get(name, 3), 0)
