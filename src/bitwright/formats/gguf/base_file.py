"""The GGUF file of ``--base``: a new file copies its metadata and tokenizer, and none of its weights."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH_NAMES
from gguf import GGUFValueType as ValueType

from bitwright.core.errors import CheckpointError, RecipeError
from bitwright.formats.gguf.architecture import OUTPUT, ROPE_FACTORS, Architecture
from bitwright.formats.gguf.file import DTYPES, Entry
from bitwright.formats.gguf.header import Header, Listed, Stored, read_list
from bitwright.formats.gguf.reading import opened
from bitwright.formats.gguf.settings import TOKENS, unlike

OWN = (
    "GGUF.",
    "split.",
    "general.alignment",
    "general.architecture",
    "general.file_type",
    "general.quantization",
    "bitwright.",
)
"""The beginnings of keys that are not taken over."""
TENSORS_KEPT = (ROPE_FACTORS,)
"""The tensors that are taken over: they are no weights."""
_INSTEAD = "name the GGUF file of this model, or leave --base out"


@dataclass(frozen=True)
class Base:
    """An opened GGUF file, its header checked."""

    path: Path
    header: Header

    @classmethod
    def open(cls, path: Path) -> "Base":
        """Open a base. Raises CheckpointError for what is no GGUF file, is damaged, or is a part of a model."""
        try:
            return cls(path, _header(path))
        except CheckpointError as error:
            raise CheckpointError(f"--base {error}") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"--base {path}: cannot be read as a GGUF file: {error}; {_INSTEAD}") from None

    def entries(self) -> Iterator[Entry]:
        """Yield the metadata that are taken over."""
        for name, value in self.header.metadata.items():
            if name.startswith(OWN):
                continue
            if not isinstance(value, Listed):
                yield Entry(name, value, self.header.types[name])
            elif value.count:
                yield Entry(name, read_list(self.header, name), ValueType.ARRAY, value.element)

    def kept(self) -> dict[str, np.ndarray[Any, Any]]:
        """The tensors that are taken over, by name."""
        tensors = self.header.tensors
        return {name: self._numbers(tensors[name]) for name in TENSORS_KEPT if name in tensors}

    def _numbers(self, tensor: Stored) -> np.ndarray[Any, Any]:
        if tensor.kind not in DTYPES:
            raise CheckpointError(
                f"--base {self.path}: {tensor.name} is of type {tensor.kind.name}, and rotary factors are of F32 or F16"
            )
        return np.memmap(self.path, DTYPES[tensor.kind], "r", tensor.start, tensor.shape)

    def check(self, model: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise RecipeError for the base of another model.

        It has another architecture, tensor, shape or setting, or a tokenizer with another number of tokens.
        """
        for wrong in self._wrong(model, shapes):
            raise RecipeError(f"--base {self.path}: {wrong}; it is the file of another model: {_INSTEAD}")

    def _wrong(self, model: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
        architecture = self.header.metadata.get("general.architecture")
        if architecture != MODEL_ARCH_NAMES[model.kind]:
            yield f"is of architecture {architecture}, the model of {model.name}"
        theirs = {name: tensor.shape for name, tensor in self.header.tensors.items()}
        for name, shape in shapes.items():
            if name not in theirs and not (name == OUTPUT or name in TENSORS_KEPT):
                yield f"has no tensor {name}, of shape {list(shape)} in the model"
            if theirs.get(name, shape) != shape:
                yield f"{name} is {list(theirs[name])} there, and {list(shape)} in the model"
        for name in sorted(set(theirs) - set(shapes) - {OUTPUT, *TENSORS_KEPT}):
            yield f"has a tensor {name}, of shape {list(theirs[name])}, and the model has none"
        yield from unlike(self.header, model)
        tokens = self.header.metadata.get(TOKENS)
        count = tokens.count if isinstance(tokens, Listed) else 0
        if count != model.decoder.vocabulary:
            yield f"its tokenizer has {count} tokens ({TOKENS}), the model {model.decoder.vocabulary} (vocab_size)"


def _header(path: Path) -> Header:
    if not path.is_file():
        reason = "is a folder" if path.is_dir() else "there is no such file"
        raise CheckpointError(f"{path}: {reason}; {_INSTEAD}")
    return opened(path).header
