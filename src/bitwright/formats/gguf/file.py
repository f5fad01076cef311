"""A GGUF file, tensor by tensor: there whole, or not at all; the same model gives the same bytes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter

from bitwright.checkpoint.writer import atomic
from bitwright.core.progress import Listener, Progress
from bitwright.formats.gguf.blocks import KINDS, nbytes_of
from bitwright.formats.gguf.entries import Entry

ALIGNMENT = 32
STAGE = "gguf"
DTYPES: dict[Kind, Any] = {Kind.F32: np.float32, Kind.F16: np.float16}


@dataclass(frozen=True)
class Planned:
    """A tensor of this shape and type, made when its turn comes."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    make: Callable[[], np.ndarray[Any, Any]]

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return nbytes_of(self.shape, self.kind)


def write_file(
    output: Path, architecture: str, entries: Sequence[Entry], tensors: Sequence[Planned], listener: Listener
) -> None:
    """Writes the file beside its place and moves it there; OutputError as the file system reports it."""
    total = sum(tensor.nbytes for tensor in tensors)
    with atomic(output, total) as file:
        writer = GGUFWriter(Path(file.name), architecture)
        try:
            for entry in entries:
                writer.add_key_value(entry.key, entry.value, entry.type, entry.of)
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
