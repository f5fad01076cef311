"""Write files atomically: each is written beside its place and then moved there, so it is whole or does not exist.

Tensors are not written by `safetensors.torch.save_file`: the order of its metadata changes from run to run, and it
reports a full disk as an error that is no OSError.
"""

import errno
import io
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from bitwright.checkpoint.header import METADATA, TensorEntry, build_header, file_order
from bitwright.checkpoint.ranges import COPY_BYTES, Stored, forget, new_digest
from bitwright.core.errors import CheckpointError, OutputError
from bitwright.core.small_files import dumped
from bitwright.core.tensor_bytes import memory_of

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors of a write if there is no room
LARGE_BYTES = 8 * 2**20  # files of this size are flushed as they grow, and leave the system's cache
FLUSH_BYTES = 32 * 2**20  # at least so much is written between two flushes of a large file
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP)  # errors of file systems that cannot sync a folder


@contextmanager
def atomic(path: Path, nbytes: int) -> Iterator[BinaryIO]:
    """Open a file for `nbytes` bytes that becomes `path` if the body succeeds, and is removed if it does not.

    Until then, a former file at `path` stays. Raises OutputError if the file system refuses.
    """
    temporary = temporary_name(path)
    try:
        temporary.unlink(missing_ok=True)  # a killed run may have left one
        with _large(temporary) if nbytes >= LARGE_BYTES else _small(temporary) as file:
            yield file
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        _remove(temporary)
        raise _refused(path, nbytes, error) from error
    except BaseException:
        _remove(temporary)
        raise


@contextmanager
def _small(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that is durable once the body has succeeded."""
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _large(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that is flushed to disk while it grows. An OSError may come later than the write it is about."""
    raw = _LargeFile(path, "x")
    with io.BufferedWriter(raw) as file, ThreadPoolExecutor(1, "flush") as raw.thread:
        yield file
        file.flush()
        raw.begin_flush()
        raw.end_flush()


class _LargeFile(io.FileIO):
    """A file that another thread makes durable while it is written, so that there is little to wait for at the end.

    Durable bytes leave the system's cache. Otherwise the cache would grow to the size of the model; in virtual
    machines, getting that memory page by page costs several times as much as copying.
    """

    thread: ThreadPoolExecutor
    flushing: Future[None] | None = None
    unflushed = 0

    def write(self, data: "ReadableBuffer", /) -> int:
        """Write, and begin a flush after every FLUSH_BYTES."""
        if self.unflushed >= FLUSH_BYTES and (self.flushing is None or self.flushing.done()):
            self.begin_flush()
        written = super().write(data)
        self.unflushed += written
        return written

    def begin_flush(self) -> None:
        """Begin a flush of the bytes written so far, after the flush before has ended."""
        self.end_flush()
        self.flushing, self.unflushed = self.thread.submit(_flush, self.fileno()), 0

    def end_flush(self) -> None:
        """Wait for the flush. Raises its OSError, which the system reports only once."""
        if self.flushing is not None:
            self.flushing.result()


def _flush(file: int) -> None:
    os.fsync(file)
    forget(file)


class Digested:
    """A file that computes the digest of what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.state = file, new_digest()

    def write(self, data: "ReadableBuffer", /) -> int:
        """Write bytes."""
        self.state.update(data)
        return self.file.write(data)

    @property
    def digest(self) -> str:
        """The digest of all bytes so far."""
        return self.state.hexdigest()


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor | Stored], metadata: Mapping[str, str] | None = None
) -> str:
    """Write a safetensors file atomically and return its ``file_digest``; equal tensors give equal bytes.

    Tensors may be on any device and have any strides; those that are not contiguous on the CPU are copied, one at a
    time. Tensors of another file are copied from it. Raises CheckpointError if that file has changed, ValueError for
    the name that the format reserves, and TypeError for a dtype that it does not know.
    """
    if METADATA in tensors:
        raise ValueError(f"no tensor can be called {METADATA} in a safetensors file")
    entries = [_entry(name, tensor) for name, tensor in tensors.items()]
    header = build_header(entries, metadata)
    size = len(header) + sum(entry.nbytes for entry in entries)
    with atomic(path, size) as plain:
        file = Digested(plain)
        file.write(header)
        for entry in file_order(entries):
            tensor = tensors[entry.name]
            if isinstance(tensor, Stored):
                tensor.copy_to(file)
            else:
                file.write(memory_of(tensor.detach().cpu().contiguous()))
    return file.digest


def write_text(path: Path, text: str) -> int:
    """Write UTF-8 text atomically and return its size in bytes."""
    raw = text.encode("utf-8")
    with atomic(path, len(raw)) as file:
        file.write(raw)
    return len(raw)


def write_json(path: Path, value: Any) -> int:
    """Write indented JSON atomically, keys in the order they have, and return its size in bytes."""
    return write_text(path, dumped(value, indent=2) + "\n")


def copy_file(source: Path, target: Path) -> int:
    """Copy a file's bytes atomically and return how many. Raises CheckpointError if `source` cannot be read."""
    try:
        reading = source.open("rb")
    except OSError as error:
        raise CheckpointError(f"{source}: cannot be read: {error}") from error
    with reading:
        size = os.fstat(reading.fileno()).st_size
        with atomic(target, size) as writing:
            shutil.copyfileobj(reading, writing, COPY_BYTES)
    return size


def temporary_name(path: Path) -> Path:
    """The name of a file while it is written; it never varies, so that a second try removes the first."""
    return path.with_name(f".{path.name}.tmp")


def sync_folder(folder: Path) -> None:
    """Make a folder's entries (created, renamed, removed) durable. Raises OSError as the file system reports it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def free_bytes(path: Path) -> int:
    """Bytes free to this user on the file system that `path` is, or would be, on."""
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


def _entry(name: str, tensor: torch.Tensor | Stored) -> TensorEntry:
    if isinstance(tensor, Stored):
        return TensorEntry(name, tensor.entry.dtype, tensor.entry.shape)
    return TensorEntry(name, tensor.dtype, tuple(tensor.shape))


def _remove(path: Path) -> None:
    """Remove a file if possible; another error is already on its way."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _refused(path: Path, nbytes: int, error: OSError) -> OutputError:
    """The error for a file that could not be written."""
    try:
        free = f"{free_bytes(path.parent)} bytes are free there"
    except OSError:
        free = "how much is free there cannot be told"
    remedy = "make room or choose another output" if error.errno in FULL else "check the folder and its permissions"
    return OutputError(
        f"{path}: writing {nbytes} bytes failed: {error.strerror or error}; {free}. Nothing half-written was left; "
        f"{remedy}, then repeat the command: what is finished is kept"
    )
