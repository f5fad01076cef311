"""Byte ranges of files with checked headers; files that have changed since the check are refused."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO, Protocol

import torch

from bitwright.checkpoint.header import Header, TensorEntry
from bitwright.core.errors import ChangedError, CheckpointError, shown
from bitwright.core.tensor_bytes import DIGEST_BYTES, memory_of

COPY_BYTES = 4 * 2**20
CHUNK_BYTES = 64 * 2**20
NARROW_CHUNK_BYTES = CHUNK_BYTES // 4  # float8 has no min and max of its own and is widened to float32


class Sink(Protocol):
    """Something that bytes are written to."""

    def write(self, data: memoryview, /) -> int:
        """Write bytes."""


def new_digest() -> "blake2b":
    """Begin a digest: 32 hexadecimal digits that tell whether bytes are still the same."""
    return blake2b(digest_size=DIGEST_BYTES)


def file_digest(path: Path) -> str:
    """The digest of a file's bytes. Raises OSError if it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, new_digest).hexdigest()


@dataclass(frozen=True)
class Stored:
    """A tensor on disk, which can be copied without being held in memory."""

    header: Header
    entry: TensorEntry

    def copy_to(self, file: Sink) -> None:
        """Append the tensor's bytes to a file, a piece at a time.

        Raises CheckpointError as `pieces` does, and OSError if the file cannot be written.
        """
        buffer = memoryview(bytearray(min(COPY_BYTES, self.entry.nbytes)))
        for piece in pieces(self.header, self.entry.start, self.entry.end, buffer):
            file.write(piece)

    def forget(self) -> None:
        """Release the memory in which the system caches the tensor's bytes, which are not read again."""
        with suppress(OSError), self.header.path.open("rb") as file:
            forget(file.fileno(), self.entry.start, self.entry.nbytes)


def forget(file: int, start: int = 0, nbytes: int = 0) -> None:
    """Release the memory in which the system caches a file's durable bytes: all of them, or `nbytes` from `start`."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(file, start, nbytes, os.POSIX_FADV_DONTNEED)


def read_into(header: Header, start: int, target: memoryview) -> None:
    """Fill `target` with the bytes of the file from `start` on."""
    for _ in pieces(header, start, start + target.nbytes, target):
        pass


def pieces(header: Header, start: int, stop: int, buffer: memoryview) -> Iterator[memoryview]:
    """Read bytes [start, stop) of the file, a buffer's length at a time; each piece overwrites the one before.

    Raises CheckpointError if the file cannot be read, or if it has changed since its header was checked.
    """
    try:
        with header.path.open("rb") as file:
            _check_unchanged(header, file)
            file.seek(start)
            for at in range(start, stop, max(buffer.nbytes, 1)):
                piece = buffer[: min(buffer.nbytes, stop - at)]
                if file.readinto(piece) != piece.nbytes:
                    raise changed(header.path, f"it ends before byte {at + piece.nbytes}")
                yield piece
            _check_unchanged(header, file)
    except OSError as error:
        raise CheckpointError(
            f"{header.path}: cannot be read any more: {error}. If it was moved or removed, put it back as it "
            "was, else check the disk; the same command then goes on where it can"
        ) from error


def changed(path: Path, how: str) -> ChangedError:
    """The error for a file that is no longer what it was when its header was checked."""
    return ChangedError(
        f"{path}: changed under the run: {how}; start again from an unchanged checkpoint. What was made of this one is "
        "not used again"
    )


def _check_unchanged(header: Header, file: BinaryIO) -> None:
    """Require that size and modification time are what they were when the header was checked."""
    now = os.fstat(file.fileno())
    if now.st_size != header.size:
        raise changed(header.path, f"{header.size} bytes when it was opened, {now.st_size} now")
    if now.st_mtime_ns != header.mtime_ns:
        raise changed(header.path, "it was written to since it was opened")


def require_finite(header: Header, entry: TensorEntry, state: "blake2b | None" = None) -> None:
    """Raise CheckpointError if a floating tensor has a NaN or an infinity; the message counts them.

    Its bytes go into the digest ``state`` too.
    """
    finite = True
    for chunk in _chunks(header, entry, state):  # to its end: the digest is of all bytes
        finite = is_finite(chunk) and finite
    if finite:
        return
    nans = infinities = 0
    for chunk in _chunks(header, entry):
        nans += int(chunk.isnan().sum())
        infinities += int(chunk.isinf().sum())
    raise not_finite(header.path, entry, nans, infinities)


def not_finite(path: Path, entry: TensorEntry, nans: int, infinities: int) -> CheckpointError:
    """The error for a tensor with values that are no numbers."""
    return CheckpointError(
        f"{path}: tensor {shown(entry.name)} {list(entry.shape)} has {nans} NaN and {infinities} infinite of "
        f"its {entry.elements} values; the checkpoint is damaged, or was saved from a training run that had diverged: "
        "download it again"
    )


def is_finite_tensor(header: Header, entry: TensorEntry) -> bool:
    """Whether a floating tensor on disk is finite."""
    return all(is_finite(chunk) for chunk in _chunks(header, entry))


def is_finite(chunk: torch.Tensor) -> bool:
    """Whether a floating tensor is finite: NaN and infinity show in its minimum or maximum."""
    low, high = torch.aminmax(chunk)
    return bool(low.isfinite() and high.isfinite())


def _chunks(header: Header, entry: TensorEntry, state: "blake2b | None" = None) -> Iterator[torch.Tensor]:
    """The values of a tensor in pieces [elements] of at most 64 MiB; each piece overwrites the one before."""
    narrow = entry.dtype.itemsize == 1
    length = min(NARROW_CHUNK_BYTES if narrow else CHUNK_BYTES, entry.nbytes)
    buffer = torch.empty(length, dtype=torch.uint8, device="cpu")
    for piece in pieces(header, entry.start, entry.end, memory_of(buffer)):
        if state is not None:
            state.update(piece)
        values = buffer[: piece.nbytes].view(entry.dtype)
        yield values.float() if narrow else values
