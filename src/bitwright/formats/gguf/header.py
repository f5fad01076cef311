"""The header of a GGUF file, which stands before its data: every length in it is checked against the file's.

    "GGUF", version, number of tensors, number of keys; keys with values; names, shapes, types, offsets; data, aligned

Lists are passed over, not kept: a vocabulary is long, and nobody here reads it.
"""

import mmap
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from struct import Struct, unpack_from
from typing import Any

from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType as ValueType

from bitwright.core.errors import CheckpointError
from bitwright.core.small_files import require_regular

MAGIC, VERSIONS, ALIGNMENT, DIMENSIONS = b"GGUF", (2, 3), 32, 4
MOST_ENTRIES, MOST_TEXT, MOST_HEADER = 2**20, 2**24, 2**28
"""The most texts, keys and tensors of a header together, and the most bytes of a text and of a header.

The largest vocabularies have 262,144 tokens and 514,906 merges, in 15 MB.
"""
SCALARS = {
    ValueType.UINT8: "<B", ValueType.INT8: "<b", ValueType.UINT16: "<H", ValueType.INT16: "<h",
    ValueType.UINT32: "<I", ValueType.INT32: "<i", ValueType.UINT64: "<Q", ValueType.INT64: "<q",
    ValueType.FLOAT32: "<f", ValueType.FLOAT64: "<d", ValueType.BOOL: "<?",
}  # fmt: skip


@dataclass(frozen=True)
class Listed:
    """A list that was passed over: the number of its values, their type, and where the first of them begins."""

    count: int
    element: ValueType
    start: int


@dataclass(frozen=True)
class Stored:
    """A tensor in the file: its shape (columns last), its type, and where its bytes begin."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    start: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """The contents of a header: metadata with their types, and tensors by name in order.

    ``nbytes`` is where the last of them ends.
    """

    path: Path
    metadata: Mapping[str, Any]
    types: Mapping[str, ValueType]
    tensors: Mapping[str, Stored]
    alignment: int
    nbytes: int


def read_header(path: Path) -> Header:
    """Read a header. Raises CheckpointError for what is no GGUF file, is cut short, or contradicts itself."""
    try:
        require_regular(path)
        with path.open("rb") as file:
            start = file.read(len(MAGIC))
            if start != MAGIC:
                raise CheckpointError(
                    f"{path}: is no GGUF file: it begins with {start!r}, not {MAGIC!r}; name another, or "
                    "download it again"
                )
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _header(path, _Walk(path, data))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read as a GGUF file: {error}") from None


def read_list(header: Header, key: str) -> list[Any]:
    """Read a list of the metadata, which ``read_header`` passed over. Raises CheckpointError."""
    try:
        with header.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Walk(header.path, data).listed(key, header.metadata[key])
    except OSError as error:
        raise CheckpointError(f"{header.path}: cannot be read as a GGUF file: {error}") from None


def _header(path: Path, walk: "_Walk") -> Header:
    version = walk.number("<I", "its version")
    if version not in VERSIONS:
        raise CheckpointError(f"{path}: is GGUF of version {version}; read are {VERSIONS}, for little-endian machines")
    tensors, keys = walk.number("<Q", "how many tensors"), walk.number("<Q", "how many keys")
    metadata, types = dict[str, Any](), dict[str, ValueType]()
    for _ in range(keys):
        key = walk.text("a key of the metadata")
        if key in metadata:
            raise CheckpointError(f"{path}: says {key} twice; the file is damaged")
        kind = walk.number("<I", key)
        metadata[key], types[key] = walk.value(kind, key), ValueType(kind)
    listed = list(_tensors(walk, tensors))
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= MOST_HEADER:
        raise CheckpointError(f"{path}: aligns its tensors by {alignment}; the file is damaged")
    begins = _aligned(walk.at, alignment)
    entries = [_placed(path, begins, alignment, *tensor) for tensor in listed]
    _refuse(path, entries, len(walk.data))
    ends = max((entry.start + entry.nbytes for entry in entries), default=begins)
    return Header(path, metadata, types, {entry.name: entry for entry in entries}, alignment, ends)


def _tensors(walk: "_Walk", count: int) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
    """Yield name, shape, type and offset in the data."""
    for _ in range(count):
        name = walk.text("the name of a tensor")
        dimensions = walk.number("<I", name)
        shape = tuple(walk.number("<Q", name) for _ in range(min(dimensions, DIMENSIONS)))
        if not 0 < dimensions <= DIMENSIONS or 0 in shape:
            raise CheckpointError(f"{walk.path}: {name} is of shape {list(shape)}; the file is damaged")
        yield name, shape[::-1], walk.number("<I", name), walk.number("<Q", name)


def _placed(
    path: Path, begins: int, alignment: int, name: str, shape: tuple[int, ...], kind: int, offset: int
) -> Stored:
    """Place a tensor in the file.

    Raises CheckpointError for a type that nobody knows, rows that are no whole blocks, and a place out of alignment.
    """
    try:
        block, nbytes = GGML_QUANT_SIZES[Kind(kind)]
    except (ValueError, KeyError):
        raise CheckpointError(f"{path}: {name} is of type {kind}, which gguf's library does not know") from None
    if shape[-1] % block or offset % alignment:
        raise CheckpointError(
            f"{path}: {name} {list(shape)} is no whole number of {Kind(kind).name}'s blocks of {block}, or begins at "
            f"{offset}, which is not aligned; the file is damaged"
        )
    count = 1
    for size in shape:
        count *= size
    return Stored(name, shape, Kind(kind), begins + offset, count // block * nbytes)


def _refuse(path: Path, entries: list[Stored], length: int) -> None:
    """Raise CheckpointError for a name that is there twice, tensors that overlap, and a file that ends early."""
    twice = [name for name, times in Counter(entry.name for entry in entries).items() if times > 1]
    if twice:
        raise CheckpointError(f"{path}: has tensor {twice[0]} twice; the file is damaged, or its writer is at fault")
    end, before = 0, ""
    for entry in sorted(entries, key=lambda entry: entry.start):
        if entry.start < end:
            raise CheckpointError(f"{path}: {entry.name} begins within {before}; the file is damaged")
        end, before = entry.start + entry.nbytes, entry.name
        if end > length:
            raise CheckpointError(
                f"{path}: is cut short: {before} ends at byte {end:,}, the file at {length:,}; download it again"
            )


def _aligned(at: int, alignment: int) -> int:
    return -(-at // alignment) * alignment


class _Walk:
    """A walk through the bytes of a file, never beyond their end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at, self.entries = path, data, len(MAGIC), 0

    def entry(self) -> None:
        """Count one more text, key or tensor. Raises CheckpointError for more than a header has."""
        self.entries += 1
        if self.entries > MOST_ENTRIES:
            raise CheckpointError(
                f"{self.path}: has more than {MOST_ENTRIES:,} texts, keys and tensors; no model has, so it is damaged"
            )

    def number(self, form: str, what: str) -> Any:
        """Read the next number, of this form."""
        return unpack_from(form, self.data, self._past(Struct(form).size, what))[0]

    def text(self, what: str) -> str:
        """Read the next text. Raises CheckpointError for bytes that are none."""
        count = self.number("<Q", what)
        if count > MOST_TEXT:
            raise CheckpointError(
                f"{self.path}: {what} is a text of {count:,} bytes, and {MOST_TEXT:,} are the most; it is cut short, "
                "or damaged"
            )
        self.entry()
        start = self._past(count, what)
        try:
            return self.data[start : start + count].decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path}: {what} is no text; the file is damaged") from None

    def value(self, kind: int, key: str) -> Any:
        """Read the next value of a type: a number, a text, or the length of a list."""
        if kind == ValueType.STRING:
            return self.text(key)
        if kind in SCALARS:
            return self.number(SCALARS[ValueType(kind)], key)
        if kind != ValueType.ARRAY:
            raise CheckpointError(
                f"{self.path}: {key} is of type {kind}, which GGUF does not have; the file is damaged"
            )
        element, count = self.number("<I", key), self.number("<Q", key)
        if element in SCALARS:
            start = self._past(count * Struct(SCALARS[ValueType(element)]).size, key)
            return Listed(count, ValueType(element), start)
        if element != ValueType.STRING:
            raise CheckpointError(
                f"{self.path}: {key} is a list of type {element}, which is not read; the file is damaged"
            )
        start = self.at
        for _ in range(count):
            self.entry()
            self._past(self.number("<Q", key), key)
        return Listed(count, ValueType.STRING, start)

    def listed(self, key: str, values: Listed) -> list[Any]:
        """Read a list that was passed over."""
        self.at = values.start
        if values.element != ValueType.STRING:
            return [self.number(SCALARS[values.element], key) for _ in range(values.count)]
        return [self.text(key) for _ in range(values.count)]

    def _past(self, count: int, what: str) -> int:
        """Pass the next bytes, and return where they begin."""
        start = self.at
        self.at += count
        if self.at > len(self.data):
            raise CheckpointError(
                f"{self.path}: is cut short, or damaged: it ends at byte {len(self.data):,}, within {what}; download "
                "it again"
            )
        if self.at > MOST_HEADER:
            raise CheckpointError(
                f"{self.path}: its header has more than {MOST_HEADER:,} bytes, at {what}; no model's has, it is damaged"
            )
        return start
