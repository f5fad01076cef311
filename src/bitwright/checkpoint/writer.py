"""Files that are either there whole or not at all: written beside their place, made durable, then moved into it.

Tensors are streamed by hand, not through `safetensors.torch.save_file`: that writes the metadata in an order which
changes from run to run, and reports a full disk as an error that is no OSError.
"""

import errno
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from bitwright.checkpoint.header import METADATA, TensorEntry, build_header, file_order
from bitwright.checkpoint.ranges import COPY_BYTES, Stored, forget
from bitwright.core.errors import CheckpointError, OutputError
from bitwright.core.tensor_bytes import memory_of

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a write says where there is no room
LARGE_BYTES = 8 * 2**20  # of a file that is not kept in memory once it is durable
STEP_BYTES = 32 * 2**20  # at least so much is written between two times that a large file is made durable
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP)  # file systems that cannot sync a folder say one of these


@contextmanager
def atomic(path: Path, nbytes: int) -> Iterator[BinaryIO]:
    """A file to write `nbytes` bytes to, which becomes `path` if the body succeeds and leaves nothing if it does not.

    A former file `path` stays as it was until then. OutputError for what the file system refuses.
    """
    temporary = temporary_name(path)
    try:
        temporary.unlink(missing_ok=True)  # what a killed run left
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
    """A new file, durable when the body has succeeded."""
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _large(path: Path) -> Iterator[BinaryIO]:
    """A new file, durable when the body has succeeded. Raises OSError, later than what it is about was written."""
    raw = _LargeFile(path, "x")
    with io.BufferedWriter(raw) as file, ThreadPoolExecutor(1, "flush") as raw.behind:
        yield file
        file.flush()
        raw.settle()
        raw.settled()


class _LargeFile(io.FileIO):
    behind: ThreadPoolExecutor
    settling: Future[None] | None = None
    waiting = 0

    def write(self, data: "ReadableBuffer", /) -> int:
        """Writes as a file does; every now and then another thread makes durable what there is so far."""
        if self.waiting >= STEP_BYTES and (self.settling is None or self.settling.done()):
            self.settle()
        written = super().write(data)
        self.waiting += written
        return written

    def settle(self) -> None:
        """Begins to make durable what there is, once that is done which was begun before; raises what befell that."""
        self.settled()
        self.settling, self.waiting = self.behind.submit(_settle, self.fileno()), 0

    def settled(self) -> None:
        """Waits for what was begun; raises OSError for what befell it, which the system tells only once."""
        if self.settling is not None:
            self.settling.result()


def _settle(file: int) -> None:
    os.fsync(file)
    forget(file)


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor | Stored], metadata: Mapping[str, str] | None = None
) -> int:
    """Writes a safetensors file atomically and returns its size in bytes; the same tensors give the same bytes.

    Tensors of any device and stride; one at a time is copied where it is not contiguous on the CPU; or from another
    file, whose CheckpointError for what has changed under the run is passed on. ValueError for the
    name the format keeps for itself, TypeError for a dtype it does not know.
    """
    if METADATA in tensors:
        raise ValueError(f"no tensor can be called {METADATA} in a safetensors file")
    entries = [_entry(name, tensor) for name, tensor in tensors.items()]
    header = build_header(entries, metadata)
    size = len(header) + sum(entry.nbytes for entry in entries)
    with atomic(path, size) as file:
        file.write(header)
        for entry in file_order(entries):
            tensor = tensors[entry.name]
            if isinstance(tensor, Stored):
                tensor.copy_to(file)
            else:
                file.write(memory_of(tensor.detach().cpu().contiguous()))
    return size


def write_text(path: Path, text: str) -> int:
    """Writes UTF-8 text atomically and returns its size in bytes."""
    raw = text.encode("utf-8")
    with atomic(path, len(raw)) as file:
        file.write(raw)
    return len(raw)


def write_json(path: Path, value: Any) -> int:
    """Writes JSON atomically, indented, keys in the order they have, and returns its size in bytes."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def copy_file(source: Path, target: Path) -> int:
    """Copies a file's bytes atomically and returns how many; CheckpointError when `source` cannot be read."""
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
    """Where a file stands while it is written: the same name each time, so that a second try clears up the first."""
    return path.with_name(f".{path.name}.tmp")


def sync_folder(folder: Path) -> None:
    """Makes a folder's entries (created, renamed, removed) durable; OSError as the file system reports it."""
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
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free


def _entry(name: str, tensor: torch.Tensor | Stored) -> TensorEntry:
    if isinstance(tensor, Stored):
        return TensorEntry(name, tensor.entry.dtype, tensor.entry.shape)
    return TensorEntry(name, tensor.dtype, tuple(tensor.shape))


def _remove(path: Path) -> None:
    """Removes a file if that can be done; the error on the way is already another."""
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
