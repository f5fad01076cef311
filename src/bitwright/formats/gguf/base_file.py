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


@dataclass(frozen=True)
class Base:
    """A file that was opened."""

    path: Path
    reader: Any

    @classmethod
    def open(cls, path: Path) -> "Base":
        """Raises CheckpointError for a file that is not GGUF or cannot be read."""
        try:
            return cls(path, GGUFReader(path))
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise CheckpointError(f"{path}: cannot be read as a GGUF file: {error}") from None

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
        """Raises RecipeError where the base is of another model: an architecture, a tensor, a shape."""
        found = self.reader.fields.get("general.architecture")
        named = None if found is None else found.contents()
        if named != MODEL_ARCH_NAMES[model.kind]:
            raise RecipeError(f"{self.path}: is of architecture {named}, the model of {model.name}; {_ANOTHER}")
        theirs = {each.name: tuple(int(n) for n in reversed(each.shape)) for each in self.reader.tensors}
        for name, shape in shapes.items():
            if name not in theirs and not (name == OUTPUT or name in TENSORS_KEPT):
                raise RecipeError(f"{self.path}: has no tensor {name}, of shape {list(shape)} in the model; {_ANOTHER}")
            if theirs.get(name, shape) != shape:
                raise RecipeError(
                    f"{self.path}: {name} is {list(theirs[name])} there, and {list(shape)} in the model; {_ANOTHER}"
                )
        more = sorted(set(theirs) - set(shapes) - {OUTPUT, *TENSORS_KEPT})
        if more:
            extra = f"{more[0]}, of shape {list(theirs[more[0]])}"
            raise RecipeError(f"{self.path}: has a tensor {extra}, and the model has none; {_ANOTHER}")


_ANOTHER = "it is the file of another model. Leave --base out, or name the GGUF file of this one"


def _listed(value: Any) -> Any:
    return value if isinstance(value, list) else [value]
