"""MLC-LLM's files of weights: ``params_shard_N.bin``, and ``tensor-cache.json``, their index."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import md5
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright.checkpoint.writer import atomic, write_json
from bitwright.core.tensor_bytes import memory_of

SHARD_BYTES = 32 * 2**20
DTYPES = {torch.int32: "uint32", torch.float16: "float16"}
"""Words are int32 here and unsigned there; the bits are the same."""
INDEX = "tensor-cache.json"


@dataclass
class Shards:
    """Tensors one after the other without padding, in files of up to 32 MiB; a larger tensor has one of its own."""

    folder: Path
    records: list[dict[str, Any]] = field(default_factory=list)
    waiting: list[tuple[str, Tensor]] = field(default_factory=list)

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor, and write a shard if one is full. Raises OutputError."""
        if self.waiting and self._bytes() + _nbytes(tensor) > SHARD_BYTES:
            self._write()
        self.waiting.append((name, tensor.contiguous()))

    def finish(self, parameters: int) -> None:
        """Write the last shard, and the index; ``parameters`` is the number of weights of the model."""
        if self.waiting:
            self._write()
        nbytes = sum(shard["nbytes"] for shard in self.records)
        metadata = {
            "ParamSize": sum(len(shard["records"]) for shard in self.records),
            "ParamBytes": nbytes,
            "BitsPerParam": nbytes * 8 / max(1, parameters),
        }
        write_json(self.folder / INDEX, {"metadata": metadata, "records": self.records})

    def _bytes(self) -> int:
        return sum(_nbytes(tensor) for _, tensor in self.waiting)

    def _write(self) -> None:
        name, total, digest = f"params_shard_{len(self.records)}.bin", self._bytes(), md5(usedforsecurity=False)
        with atomic(self.folder / name, total) as file:
            for _, tensor in self.waiting:
                memory = memory_of(tensor)
                digest.update(memory)
                file.write(memory)
        self.records.append({
            "dataPath": name,
            "format": "raw-shard",
            "nbytes": total,
            "md5sum": digest.hexdigest(),
            "records": list(self._places()),
        })  # fmt: skip
        self.waiting.clear()

    def _places(self) -> Iterator[dict[str, Any]]:
        offset = 0
        for name, tensor in self.waiting:
            nbytes = _nbytes(tensor)
            yield {
                "name": name,
                "shape": list(tensor.shape),
                "dtype": DTYPES[tensor.dtype],
                "format": "raw",
                "nbytes": nbytes,
                "byteOffset": offset,
            }
            offset += nbytes


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
