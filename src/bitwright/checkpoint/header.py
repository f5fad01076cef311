"""The header of a safetensors file, checked before it is used.

A file is 8 bytes of little-endian header length, that many bytes of JSON, then the tensors' bytes end to end. The file
is not trusted, so every number of the JSON is checked against the file before it is used.
"""

import json
import math
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from bitwright.core.errors import CheckpointError, shown
from bitwright.core.small_files import is_text, parse_object, uncollected

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 50_000_000  # half of what the safetensors library takes; those of real files have less than 20 MB
MAX_TENSORS = 300_000  # in a folder; of a model of 384 experts in 61 layers, quantized, there are 280,000
MAX_SIZES = 10 * MAX_TENSORS  # commas and brackets of a header; a matrix has eight
MAX_RANK = 64
MAX_NAME, MAX_PARTS = 250, 32  # characters, and parts between dots; those of real models have up to 120, and 15
MAX_ELEMENTS = 2**63 - 1  # what a torch stride can hold
METADATA = "__metadata__"
TENSOR_KEYS = {"dtype", "shape", "data_offsets"}

# In the order in which the safetensors library lays tensors out, last first: wide types stand before narrow ones.
# By name, because older releases of torch lack the newest types.
_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, torch_name) for name, torch_name in _TORCH_NAMES.items() if hasattr(torch, torch_name)
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANK = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file; `start` and `end` are byte offsets from the beginning of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0
    end: int = 0

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The size of the tensor's data in bytes."""
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header; `size` (bytes) and `mtime_ns` say which state of the file it describes."""

    path: Path
    entries: dict[str, TensorEntry]
    metadata: dict[str, str]
    data_start: int
    size: int
    mtime_ns: int


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises CheckpointError if the file cannot be read, or if a claim of the header is false.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # checked first, because opening a pipe would wait for ever
            raise CheckpointError(f"{path}: not a regular file, so no safetensors file")
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            raw = _header_bytes(path, file, status.st_size)
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    data_start = LENGTH_BYTES + len(raw)
    claims = parse_object(raw, f"{path}: safetensors header", MAX_SIZES)
    metadata = _checked_metadata(path, claims.pop(METADATA, {}))
    if len(claims) > MAX_TENSORS:
        raise CheckpointError(f"{path}: {len(claims):,} tensors in one file; more than {MAX_TENSORS:,} is never real")
    with uncollected():
        entries = {name: _checked_entry(path, name, claim, data_start) for name, claim in claims.items()}
    _check_layout(path, list(entries.values()), data_start, status.st_size)
    return Header(path, entries, metadata, data_start, status.st_size, status.st_mtime_ns)


def build_header(entries: Iterable[TensorEntry], metadata: Mapping[str, str] | None = None) -> bytes:
    """The first bytes of a file that holds these tensors, as the safetensors library would write them.

    Only name, dtype and shape of an entry are used. Equal entries give equal bytes, in any order. Raises TypeError for
    a dtype that the format does not know.
    """
    header: dict[str, Any] = {METADATA: dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for entry in file_order(entries):
        if entry.dtype not in DTYPE_NAMES:
            raise TypeError(f"{entry.name}: safetensors files hold no {entry.dtype}")
        offsets = [offset, offset + entry.nbytes]
        header[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets,
        }  # fmt: skip
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % LENGTH_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def file_order(entries: Iterable[TensorEntry]) -> list[TensorEntry]:
    """Sort entries as their data stands in a file: widest dtype first (keeps data aligned), then by name."""
    return sorted(entries, key=lambda entry: (-_RANK.get(entry.dtype, 0), entry.name))


def _header_bytes(path: Path, file: BinaryIO, size: int) -> bytes:
    """Read the header's JSON, after checking that its length is allowed and inside of the file."""
    if size < LENGTH_BYTES:
        raise CheckpointError(
            f"{path}: no safetensors file: it has {size} bytes, and the header's length alone takes {LENGTH_BYTES}; "
            "an interrupted download? Fetch it again"
        )
    length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: no safetensors file: its first {LENGTH_BYTES} bytes promise a header of {length} bytes, and more "
            f"than {MAX_HEADER_BYTES} is never real; is this another format, or a git-lfs pointer?"
        )
    if LENGTH_BYTES + length > size:
        raise CheckpointError(
            f"{path}: truncated: a header of {length} bytes is promised, the file has {size} bytes in all; "
            "fetch it again"
        )
    raw = file.read(length)
    if len(raw) != length or raw[:1] != b"{":
        raise CheckpointError(f"{path}: no safetensors file: its header begins with {shown(raw[:8])}, not with '{{'")
    return raw


def _checked_metadata(path: Path, claim: object) -> dict[str, str]:
    """Check the `__metadata__` of a header, which maps text to text."""
    if not isinstance(claim, dict) or not all(map(_is_text, (*claim, *claim.values()))):
        raise CheckpointError(f"{path}: {METADATA} must map text to text, found {shown(claim)}")
    return claim


def _is_text(value: object) -> bool:
    return isinstance(value, str) and is_text(value)


def _checked_entry(path: Path, name: str, claim: object, data_start: int) -> TensorEntry:
    """Check one tensor's claims against each other, not yet against the file."""
    try:
        return _entry(name, claim, data_start)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: tensor {shown(name)}: {error}") from None


def _entry(name: str, claim: object, data_start: int) -> TensorEntry:
    if not is_text(name):
        raise CheckpointError("its name has half of a surrogate pair, which is no character; the file is damaged")
    if not isinstance(claim, dict) or set(claim) != TENSOR_KEYS:
        raise CheckpointError(f"expected exactly {', '.join(sorted(TENSOR_KEYS))}, found {shown(claim)}")
    if len(name) > MAX_NAME or name.count(".") >= MAX_PARTS:
        raise CheckpointError(
            f"a name of {len(name):,} characters in {name.count('.') + 1} parts; more than {MAX_NAME} characters or "
            f"{MAX_PARTS} parts are never real"
        )
    dtype = DTYPES.get(claim["dtype"]) if isinstance(claim["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(f"unknown dtype {shown(claim['dtype'])}. Known: {', '.join(sorted(DTYPES))}")
    shape = _checked_shape(claim["shape"], dtype.itemsize)
    start, end = _checked_offsets(claim["data_offsets"])
    entry = TensorEntry(name, dtype, shape, data_start + start, data_start + end)
    if entry.nbytes != end - start:
        raise CheckpointError(
            f"{claim['dtype']} of shape {shown(list(shape))} takes {entry.nbytes} bytes, but its offsets "
            f"[{shown(start)}, {shown(end)}] hold {shown(end - start)}"
        )
    return entry


def _checked_shape(claim: object, itemsize: int) -> tuple[int, ...]:
    """Check that torch can hold a shape: at most 64 sizes, none negative, strides below 2^63 even if a size is 0."""
    if not isinstance(claim, list) or not all(_is_size(size) for size in claim):
        raise CheckpointError(f"the shape must be a list of integers >= 0, found {shown(claim)}")
    if len(claim) > MAX_RANK:
        raise CheckpointError(f"{len(claim)} dimensions; more than {MAX_RANK} cannot be held")
    strides = math.prod(
        max(min(size, MAX_ELEMENTS), 1) for size in claim
    )  # capped: else a product may grow to megabytes
    if max(claim, default=0) > MAX_ELEMENTS or strides * itemsize > MAX_ELEMENTS:
        raise CheckpointError(f"the shape {shown(claim)} has more elements than 63 bits can count")
    return tuple(claim)


def _checked_offsets(claim: object) -> tuple[int, int]:
    """Check start and end of a tensor, in bytes from the beginning of the data: 0 <= start <= end."""
    if not isinstance(claim, list) or len(claim) != 2 or not all(_is_size(offset) for offset in claim):
        raise CheckpointError(f"data_offsets must be two integers >= 0, found {shown(claim)}")
    start, end = claim
    if start > end:
        raise CheckpointError(f"data_offsets are reversed: {shown(claim)}")
    return start, end


def _is_size(value: object) -> bool:
    """Whether a value is an integer >= 0; a bool is not, although bool is a subclass of int."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_layout(path: Path, entries: list[TensorEntry], data_start: int, size: int) -> None:
    """Require that the tensors cover the data from its first byte to the file's last, each byte once."""
    promised = max((entry.end for entry in entries), default=data_start)
    if promised > size:
        first = min((entry for entry in entries if entry.end > size), key=lambda entry: (entry.end, entry.name))
        raise CheckpointError(
            f"{path}: truncated: the header promises {shown(promised)} bytes, the file has {size}; the first tensor "
            f"that ends past the file is {shown(first.name)}; fetch the file again"
        )
    reached = data_start
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.end)):
        if entry.start != reached:
            fault = "overlaps the tensor before it" if entry.start < reached else "leaves a hole before it"
            raise CheckpointError(
                f"{path}: tensor {shown(entry.name)} {fault}: it starts at byte {entry.start}, expected {reached}"
            )
        reached = entry.end
    if size != reached:
        raise CheckpointError(f"{path}: {size - reached} bytes follow the last tensor, which ends at byte {reached}")
