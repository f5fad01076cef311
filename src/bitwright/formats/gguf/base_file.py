"""A GGUF file whose metadata are taken: everything but the weights."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH_NAMES, GGUFReader
from gguf import GGUFValueType as ValueType

from bitwright.core.errors import CheckpointError, RecipeError
from bitwright.formats.gguf.architecture import ROPE_FACTORS, Architecture
from bitwright.formats.gguf.entries import Entry
from bitwright.formats.gguf.header import Header, Listed
from bitwright.formats.gguf.reading import opened
from bitwright.formats.gguf.settings import unlike

OWN = (
    "GGUF.",
    "split.",
    "general.alignment",
    "general.architecture",
    "general.file_type",
    "general.quantization",
    "bitwright.",
)
"""How keys begin that are not taken over."""
OUTPUT = "output.weight"
TENSORS_KEPT = (ROPE_FACTORS,)
"""Tensors of the base that go along: they are no weights."""
TOKENS = "tokenizer.ggml.tokens"
_INSTEAD = "name the GGUF file of this model, or leave --base out"


@dataclass(frozen=True)
class Base:
    """A file that was opened, its header distrusted."""

    path: Path
    header: Header
    reader: Any

    @classmethod
    def open(cls, path: Path) -> "Base":
        """Raises CheckpointError for what is no file, is not GGUF, is damaged, or is a part of a model."""
        try:
            return cls(path, _header(path), GGUFReader(path))
        except CheckpointError as error:
            raise CheckpointError(f"--base {error}") from None
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise CheckpointError(f"--base {path}: cannot be read as a GGUF file: {error}; {_INSTEAD}") from None

    def entries(self) -> Iterator[Entry]:
        """The metadata that are taken over."""
        for name, field in self.reader.fields.items():
            if not name.startswith(OWN) and field.types and len(value := _listed(field.contents())) > 0:
                of = field.types[-1] if field.types[0] is ValueType.ARRAY else None
                yield Entry(name, value[0] if of is None else value, field.types[0], of)

    def kept(self) -> dict[str, np.ndarray[Any, Any]]:
        """Tensors that are no weights of the model."""
        return {each.name: each.data for each in self.reader.tensors if each.name in TENSORS_KEPT}

    def check(self, model: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises RecipeError where the base is of another model: an architecture, a tensor, a shape, a setting that is
        not the model's, a tokenizer with another number of tokens."""
        for wrong in self._wrong(model, shapes):
            raise RecipeError(f"--base {self.path}: {wrong}; it is the file of another model: {_INSTEAD}")

    def _wrong(self, model: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
        named = self.header.says.get("general.architecture")
        if named != MODEL_ARCH_NAMES[model.kind]:
            yield f"is of architecture {named}, the model of {model.name}"
        theirs = {name: each.shape for name, each in self.header.tensors.items()}
        for name, shape in shapes.items():
            if name not in theirs and not (name == OUTPUT or name in TENSORS_KEPT):
                yield f"has no tensor {name}, of shape {list(shape)} in the model"
            if theirs.get(name, shape) != shape:
                yield f"{name} is {list(theirs[name])} there, and {list(shape)} in the model"
        for name in sorted(set(theirs) - set(shapes) - {OUTPUT, *TENSORS_KEPT}):
            yield f"has a tensor {name}, of shape {list(theirs[name])}, and the model has none"
        yield from unlike(self.header, model)
        tokens = self.header.says.get(TOKENS)
        count = tokens.count if isinstance(tokens, Listed) else 0
        if count != model.decoder.vocabulary:
            yield f"its tokenizer has {count} tokens ({TOKENS}), the model {model.decoder.vocabulary} (vocab_size)"


def _header(path: Path) -> Header:
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "there is no such file"
        raise CheckpointError(f"{path}: {found}; {_INSTEAD}")
    return opened(path).header


def _listed(value: Any) -> Any:
    return value if isinstance(value, list) else [value]
