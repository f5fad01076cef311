"""A GGUF file as it is written: metadata, then tensors, one at a time.

A file is there whole or not at all. The same model gives the same bytes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType as ValueType
from gguf import GGUFWriter

from bitwright.checkpoint.writer import atomic
from bitwright.core.progress import Listener, Progress
from bitwright.formats.gguf.blocks import KINDS, nbytes_of

ALIGNMENT = 32
STAGE = "gguf"
DTYPES: dict[Kind, Any] = {Kind.F32: np.float32, Kind.F16: np.float16}


@dataclass(frozen=True)
class Entry:
    """A line of the metadata; ``element`` is the type of an array's elements."""

    key: str
    value: Any
    type: ValueType
    element: ValueType | None = None


def text(key: str, value: str) -> Entry:
    """A text in the metadata."""
    return Entry(key, value, ValueType.STRING)


def count(key: str, value: int) -> Entry:
    """A whole number from 0 in the metadata."""
    return Entry(key, int(value), ValueType.UINT32)


def number(key: str, value: float) -> Entry:
    """A number in the metadata, in float32."""
    return Entry(key, float(value), ValueType.FLOAT32)


def flag(key: str, value: bool) -> Entry:
    """A yes or no in the metadata."""
    return Entry(key, bool(value), ValueType.BOOL)


def texts(key: str, values: list[str]) -> Entry:
    """A list of texts in the metadata, not empty."""
    return Entry(key, values, ValueType.ARRAY, ValueType.STRING)


def integers(key: str, values: list[int]) -> Entry:
    """A list of integers in the metadata, not empty."""
    return Entry(key, values, ValueType.ARRAY, ValueType.INT32)


def numbers(key: str, values: list[float]) -> Entry:
    """A list of numbers in the metadata, in float32, not empty."""
    return Entry(key, values, ValueType.ARRAY, ValueType.FLOAT32)


@dataclass(frozen=True)
class Planned:
    """A tensor to write: its shape and type, and how it is made when its turn comes."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    make: Callable[[], np.ndarray[Any, Any]]

    @property
    def nbytes(self) -> int:
        """The size in the file."""
        return nbytes_of(self.shape, self.kind)


def write_file(
    output: Path, architecture: str, entries: Sequence[Entry], tensors: Sequence[Planned], listener: Listener
) -> None:
    """Write the file beside its place and move it there. Raises OutputError if the file system refuses."""
    total = sum(tensor.nbytes for tensor in tensors)
    with atomic(output, total) as file:
        writer = GGUFWriter(Path(file.name), architecture)
        try:
            for entry in entries:
                writer.add_key_value(entry.key, entry.value, entry.type, entry.element)
            for tensor in tensors:
                _announce(writer, tensor)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for n, tensor in enumerate(tensors):
                listener(Progress(STAGE, n, len(tensors), tensor.name))
                writer.write_tensor_data(tensor.make())
            listener(Progress(STAGE, len(tensors), len(tensors), "all tensors"))
        finally:
            if writer.fout is not None:
                writer.close()


def _announce(writer: GGUFWriter, tensor: Planned) -> None:
    if tensor.kind in KINDS:
        shape, dtype = (*tensor.shape[:-1], nbytes_of((tensor.shape[-1],), tensor.kind)), np.uint8
    else:
        shape, dtype = tensor.shape, DTYPES[tensor.kind]
    writer.add_tensor_info(tensor.name, shape, np.dtype(dtype), tensor.nbytes, raw_dtype=tensor.kind)
