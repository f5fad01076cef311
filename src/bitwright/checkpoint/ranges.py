"""Byte ranges of files whose headers have been checked, refused when the file is no longer the one that was checked."""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from bitwright.checkpoint.header import Header, TensorEntry
from bitwright.core.errors import ChangedError, CheckpointError

COPY_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Stored:
    """A tensor where it lies on disk, to be copied without being held in memory."""

    header: Header
    entry: TensorEntry

    def copy_to(self, file: BinaryIO) -> None:
        """Writes the tensor's bytes to the end of a file, a piece at a time.

        CheckpointError as ``pieces``; OSError for what the file written to does not take.
        """
        buffer = memoryview(bytearray(min(COPY_BYTES, self.entry.nbytes)))
        for piece in pieces(self.header, self.entry.start, self.entry.end, buffer):
            file.write(piece)

    def forget(self) -> None:
        """Lets the system use the memory that it keeps the bytes in for others: nobody reads them again."""
        with suppress(OSError), self.header.path.open("rb") as file:
            forget(file.fileno(), self.entry.start, self.entry.nbytes)


def forget(file: int, start: int = 0, nbytes: int = 0) -> None:
    """Lets the system use the memory that it keeps a file's durable bytes in: all of them, or `nbytes` from `start`."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(file, start, nbytes, os.POSIX_FADV_DONTNEED)


def read_into(header: Header, start: int, target: memoryview) -> None:
    """Fills `target` with the bytes of the file from `start` on."""
    for _ in pieces(header, start, start + target.nbytes, target):
        pass


def pieces(header: Header, start: int, stop: int, buffer: memoryview) -> Iterator[memoryview]:
    """Bytes [start, stop) of the file, a buffer's length at a time: each piece is gone when the next one comes.

    CheckpointError if the file cannot be read, or changed since its header was checked or while it is read.
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


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, [nbytes], not a copy; writing to them writes to the tensor."""
    # as_strided: a contiguous tensor of one element may have any stride, and then views as no bytes
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data


def changed(path: Path, how: str) -> ChangedError:
    """The error for a file that is no longer what it was when its header was checked."""
    return ChangedError(
        f"{path}: changed under the run: {how}; start again from an unchanged checkpoint. What was made of this one is "
        "not used again"
    )


def _check_unchanged(header: Header, file: BinaryIO) -> None:
    """Size and modification time are what they were when the header was checked."""
    now = os.fstat(file.fileno())
    if now.st_size != header.size:
        raise changed(header.path, f"{header.size} bytes when it was opened, {now.st_size} now")
    if now.st_mtime_ns != header.mtime_ns:
        raise changed(header.path, "it was written to since it was opened")
