"""The index of MLC-LLM's shards, read and checked: the place of every tensor."""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import file_digest, md5
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.core.errors import CheckpointError
from bitwright.core.small_files import parse_object, read_small
from bitwright.formats.mlc.shards import INDEX

INDICES = (INDEX, "ndarray-cache.json")
"""The names of the index, now and in older folders."""
MAX_RANK, MAX_BYTES = 8, 2**63 - 1
"""The most dimensions of a tensor, and the largest number that may stand in the index."""
RAW, RAW_SHARD = "raw", "raw-shard"
ITEM = {"uint32": "<u4", "int32": "<i4", "float16": "<f2", "float32": "<f4", "bfloat16": "<u2", "uint8": "u1"}
ITEM |= {"int8": "i1", "uint16": "<u2"}
"""NumPy's names of the types that are read; bfloat16 as the words it is."""


@dataclass(frozen=True)
class Record:
    """A tensor: its shape and type in the folder, its shard, and the first of its bytes there."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    shard: Path
    start: int
    nbytes: int

    def rows(self, rows: slice | None = None) -> Any:
        """Rows as they are stored, mapped; by default all."""
        start, stop = (0, self.shape[0]) if rows is None else (rows.start, rows.stop)
        width = self.nbytes // self.shape[0]
        shape = (stop - start, *self.shape[1:])
        return np.memmap(self.shard, np.dtype(ITEM[self.dtype]), "r", self.start + start * width, shape)


@dataclass(frozen=True)
class Cache:
    """The contents of an index; ``digests`` are the shards' checksums."""

    records: Mapping[str, Record]
    digests: Mapping[Path, str]

    @property
    def shards(self) -> set[str]:
        """The names of the files with tensors."""
        return {record.shard.name for record in self.records.values()}

    def changed(self) -> list[str]:
        """The shards that differ from their checksums, in words; all bytes are read."""
        wrong = []
        for path, stated in self.digests.items():
            with path.open("rb") as file:
                if file_digest(file, lambda: md5(usedforsecurity=False)).hexdigest() != stated:
                    wrong.append(f"{path.name} is not what its checksum says")
        return wrong


def read_cache(folder: Path) -> Cache:
    """Read the index of a folder.

    Raises CheckpointError for an index that is not there or contradicts itself, and for shards that are missing or of
    another length.
    """
    path = next((folder / name for name in INDICES if (folder / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"{folder}: has no {INDICES[0]}, MLC-LLM's index of weights; copy the whole folder")
    records, digests = dict[str, Record](), dict[Path, str]()
    try:
        for entry in parse_object(read_small(path), str(path))["records"]:
            shard = _shard(folder, path, entry)
            if entry.get("md5sum"):
                digests[shard] = str(entry["md5sum"])
            for record in _records(path, shard, entry):
                if record.name in records:
                    raise CheckpointError(f"{path}: names {record.name} twice; the folder is damaged, write it again")
                records[record.name] = record
    except (OSError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path}: is no index of MLC-LLM's weights: {error!r}; copy the folder again") from None
    return Cache(records, digests)


def _shard(folder: Path, index: Path, entry: Any) -> Path:
    """The file of a shard, which is there and as long as the index says."""
    name = str(entry["dataPath"])
    path = folder / name
    if Path(name).name != name or entry["format"] != RAW_SHARD:
        raise CheckpointError(f"{index}: {name} is no shard beside it, in format {RAW_SHARD}; the index is damaged")
    if not path.is_file():
        raise CheckpointError(f"{folder}: {name} is missing, which {index.name} names; copy the whole folder again")
    if (length := path.stat().st_size) != entry["nbytes"]:
        raise CheckpointError(
            f"{path}: has {length:,} bytes, and {index.name} says {entry['nbytes']:,}; copy or write the folder again"
        )
    return path


def _records(index: Path, shard: Path, entry: Any) -> list[Record]:
    """The tensors of a shard, one after the other."""
    records, end = [], 0
    for tensor in sorted(entry["records"], key=lambda tensor: tensor["byteOffset"]):
        name, shape, dtype = str(tensor["name"]), tuple(int(size) for size in tensor["shape"]), str(tensor["dtype"])
        start, nbytes, form = int(tensor["byteOffset"]), int(tensor["nbytes"]), tensor["format"]
        # float32 that is kept as bfloat16 until it is loaded
        stored = "bfloat16" if form == "f32-to-bf16" and dtype == "float32" else dtype
        if len(shape) > MAX_RANK or any(abs(number) > MAX_BYTES for number in (*shape, start, nbytes)):
            raise CheckpointError(f"{index}: {name[:100]} has a size or place that no file has; the index is damaged")
        if stored not in ITEM or not (form == RAW or stored != dtype) or not shape:
            raise CheckpointError(f"{index}: {name} is {dtype} {list(shape)} in format {form}, which is not read")
        if prod(shape) * np.dtype(ITEM[stored]).itemsize != nbytes or min(shape) < 1:
            raise CheckpointError(
                f"{index}: {name} is {dtype} {list(shape)} and {nbytes:,} bytes; the index is damaged"
            )
        if start < end or start + nbytes > entry["nbytes"]:
            raise CheckpointError(
                f"{index}: {name} lies at bytes {start:,} to {start + nbytes:,} of {shard.name}, within another tensor "
                "or beyond its end; the index is damaged"
            )
        end = start + nbytes
        records.append(Record(name, shape, stored, shard, start, nbytes))
    if end != entry["nbytes"]:
        raise CheckpointError(f"{shard}: has bytes after its last tensor; the folder is damaged, write it again")
    return records
