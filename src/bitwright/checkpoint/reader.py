"""A model folder on disk: headers are read at once, the data of a tensor when it is asked for."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from hashlib import blake2b
from math import prod
from pathlib import Path
from typing import Any

import torch

from bitwright.checkpoint.header import Header, TensorEntry
from bitwright.checkpoint.layout import CONFIG, INDEX, find_weights, merge_adapter, read_bytes, read_config
from bitwright.checkpoint.ranges import Stored, is_finite_tensor, new_digest, read_into, require_finite
from bitwright.checkpoint.untied import TIED, is_untied
from bitwright.core.block import Outline
from bitwright.core.errors import CheckpointError, nearest
from bitwright.core.patterns import PatternError, check_patterns
from bitwright.core.tensor_bytes import memory_of

SAMPLE_BYTES = 64 * 1024
LAST_SECOND = 253_402_300_800
"""The first second of the year 10,000."""


class Checkpoint:
    """A lazy view of a model folder; every header has been checked, no tensor has been read.

    `folder`, `config` (config.json) and `names` (sorted) are known at once. If config.json ties an output layer with
    other values than the embedding, `config` says that it is not tied, as transformers takes it.
    """

    def __init__(self, folder: Path, config: dict[str, Any], headers: dict[str, Header], homes: dict[str, str]) -> None:
        """Take `headers` by file name and `homes`, tensor name -> file name. Use `Checkpoint.open`."""
        self.folder = folder
        self.config = config
        self.names = tuple(sorted(homes))
        self._headers = headers
        self._homes = homes

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Open the checkpoint in `folder`.

        Raises CheckpointError if it is no checkpoint, is incomplete, or if its files contradict each other.
        """
        folder = Path(folder)
        try:
            config = read_config(folder)
            checkpoint = cls(folder, config, *find_weights(folder))
            check_patterns(config.get("quantization_config"), checkpoint.names)
        except PatternError as error:
            raise CheckpointError(f"{folder / CONFIG}: {error}") from None
        except OSError as error:  # a folder that may not be listed, a disk that fails
            raise CheckpointError(f"{folder}: cannot be read: {error}") from error
        if checkpoint.config.get(TIED) is True and is_untied(checkpoint):
            checkpoint.config[TIED] = False
        return checkpoint

    def __contains__(self, name: object) -> bool:
        return name in self._homes

    def entry(self, name: str) -> TensorEntry:
        """The dtype, shape and place of a tensor. Raises CheckpointError if there is no tensor of that name."""
        return self._header(name).entries[name]

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._header(name).path

    def parts_of(self, tensors: Mapping[str, str]) -> tuple[dict[str, Header], dict[str, str]]:
        """Headers by file name, and the files of some tensors, which get new names; `tensors` are the old by the new.

        For a checkpoint that shows the same files in another way.
        """
        return self._headers, {new: self._homes[old] for new, old in tensors.items()}

    def nbytes(self, name: str) -> int:
        """The size of a tensor's data in bytes."""
        return self.entry(name).nbytes

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold tensors."""
        return tuple(sorted({self.file(name) for name in self.names}))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors by their names."""
        return {name: self.entry(name).shape for name in self.names}

    @property
    def total_bytes(self) -> int:
        """The size of all tensors' data in bytes."""
        return sum(self.nbytes(name) for name in self.names)

    @property
    def dtype_of_weights(self) -> torch.dtype:
        """The floating dtype that most elements have. Raises CheckpointError if no tensor is floating."""
        elements: Counter[torch.dtype] = Counter()
        for name in self.names:
            entry = self.entry(name)
            if entry.dtype.is_floating_point:
                elements[entry.dtype] += entry.elements
        if not elements:
            raise CheckpointError(f"{self.folder}: no tensor is floating point; is this model quantized already?")
        return elements.most_common(1)[0][0]

    def stored(self, name: str) -> Stored:
        """A tensor on disk, which can be copied as it is."""
        return Stored(self._header(name), self.entry(name))

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor to the CPU, in its stored dtype and shape, into new memory."""
        return self._read(name, self.entry(name).shape, 0)

    def read_slice(self, name: str, start_row: int, stop_row: int, memory: torch.Tensor | None = None) -> torch.Tensor:
        """Read rows [start_row, stop_row) of a tensor [rows, ...], and nothing else.

        If `memory` (uint8, [bytes], on the CPU) is large enough, the rows may be read into it, and the result be a view
        of it. Raises ValueError for rows that the tensor does not have.
        """
        shape = self.entry(name).shape
        if not shape or not 0 <= start_row <= stop_row <= shape[0]:
            raise ValueError(f"{name} of shape {list(shape)} has no rows {start_row} to {stop_row}")
        return self._read(name, (stop_row - start_row, *shape[1:]), start_row, memory)

    def fingerprint(self) -> dict[str, str]:
        """The digests that identify the checkpoint, file name -> digest, without reading all of its data."""
        small = [name for name in (CONFIG, INDEX) if (self.folder / name).is_file()]
        digests = {name: file_fingerprint(read_bytes(self.folder / name)) for name in small}
        return digests | {file: _weights_fingerprint(header) for file, header in sorted(self._headers.items())}

    def modified(self) -> dict[str, str]:
        """The time at which each weight file was last written to, file name -> time (UTC).

        `fingerprint` reads only samples; together they notice every file that may have changed.
        """
        return {file: _time_written(header) for file, header in sorted(self._headers.items())}

    def require_complete(self, outline: Outline) -> None:
        """Raise CheckpointError if tensors are missing or have other shapes than config.json asks for.

        More blocks than config.json counts are refused too: they would silently stay in full precision.
        """
        for name, wanted in outline.shapes.items():
            stored = outline.source(name)
            if stored not in self:
                if any(re.search(r"(^|\.)(lora_[AB]|base_layer)\.", name) for name in self.names):
                    raise CheckpointError(f"{self.folder}: {merge_adapter(self.folder)}")
                raise CheckpointError(
                    f"{self.folder} has no tensor '{stored}', which its config.json calls for; "
                    "the checkpoint is incomplete or belongs to another configuration: download it again"
                )
            shape = self.entry(stored).shape
            if shape != wanted:
                raise CheckpointError(
                    f"tensor '{stored}' in {self.folder} has shape {list(shape)}, but its config.json "
                    f"calls for {list(wanted)}; config and weights belong to different models: download both again"
                )
        prefix = f"{outline.blocks[0].rpartition('.')[0]}." if outline.blocks else ""
        known = tuple(f"{name}." for name in outline.blocks)
        extra = [name for name in self.names if prefix and name.startswith(prefix) and not name.startswith(known)]
        if extra:
            raise CheckpointError(
                f"{self.folder} holds '{extra[0]}', but its config.json counts {len(outline.blocks)} blocks; config "
                "and weights belong to different models: download both again"
            )

    def changed_times(self) -> dict[str, str]:
        """The time at which the system last changed each weight file or what it knows of it, file name -> nanoseconds.

        Nobody can set it, so it shows a file whose bytes were changed and whose `modified` time was set back.
        """
        return {file: str(header.path.stat().st_ctime_ns) for file, header in sorted(self._headers.items())}

    def check_finite(self, progress: Callable[[int, int], None] | None = None) -> str:
        """Read every tensor, 64 MiB at a time, and return a digest of all of them.

        Raises CheckpointError for the first floating tensor with a NaN or infinity. `progress` is called with (bytes
        checked, bytes in all) after each tensor.
        """
        done, total, state = 0, sum(map(self.nbytes, self.names)), new_digest()
        for name in sorted(self.names, key=lambda name: (self._homes[name], self.entry(name).start)):
            entry = self.entry(name)
            state.update(f"{name} {entry.dtype} {list(entry.shape)}\n".encode())
            if entry.dtype.is_floating_point:
                self._require_finite(name, state)
            else:
                state.update(memory_of(self.read(name)))
            done += entry.nbytes
            if progress is not None:
                progress(done, total)
        return state.hexdigest()

    def check_finite_tensor(self, name: str) -> None:
        """Read one tensor, 64 MiB at a time. Raises CheckpointError if it is floating and has a NaN or infinity."""
        if self.entry(name).dtype.is_floating_point:
            self._require_finite(name)

    def is_finite(self, name: str) -> bool:
        """Whether a floating tensor, read 64 MiB at a time, is finite."""
        return is_finite_tensor(self._header(name), self.entry(name))

    def _require_finite(self, name: str, state: "blake2b | None" = None) -> None:
        """Raise CheckpointError if a floating tensor has a NaN or infinity; its bytes go into the digest too."""
        require_finite(self._header(name), self.entry(name), state)

    def _read(
        self, name: str, shape: tuple[int, ...], skipped_rows: int, memory: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Read as many of a tensor's bytes as `shape` takes, after the skipped rows."""
        header, entry = self._header(name), self.entry(name)
        row_bytes = entry.nbytes // entry.shape[0] if skipped_rows else 0
        nbytes = prod(shape) * entry.dtype.itemsize
        if memory is None or len(memory) < nbytes:
            memory = torch.empty(nbytes, dtype=torch.uint8, device="cpu")  # also inside of `torch.device("meta")`
        tensor = memory[:nbytes].view(entry.dtype).view(shape)
        read_into(header, entry.start + skipped_rows * row_bytes, memory_of(tensor))
        return tensor

    def _header(self, name: str) -> Header:
        """The header of the file that holds a tensor."""
        if name not in self._homes:
            close = nearest(name, self.names) if len(self.names) < 20 else f"it has {len(self.names)} others"
            raise CheckpointError(f"{self.folder}: no tensor {name!r} in this checkpoint; {close}")
        return self._headers[self._homes[name]]


def file_fingerprint(raw: bytes) -> str:
    """The fingerprint of a small file: the sha256 of its bytes."""
    return f"sha256 {hashlib.sha256(raw).hexdigest()}"


def _weights_fingerprint(header: Header) -> str:
    """The fingerprint of a weight file: its size, the sha256 of its header, and the sha256 of samples.

    The samples are 64 KiB from the start, the middle and the end of the data.
    """
    data_bytes = header.size - header.data_start
    length = min(SAMPLE_BYTES, data_bytes)
    starts = (header.data_start, header.data_start + (data_bytes - length) // 2, header.size - length)
    of_header = hashlib.sha256(_bytes(header, 0, header.data_start))
    of_samples = hashlib.sha256(b"".join(_bytes(header, start, length) for start in starts))
    return f"{header.size} bytes, header sha256 {of_header.hexdigest()}, samples sha256 {of_samples.hexdigest()}"


def _time_written(header: Header) -> str:
    """The time at which the file was last written to, to the nanosecond, UTC."""
    seconds, rest = divmod(header.mtime_ns, 10**9)
    if not 0 <= seconds < LAST_SECOND:  # a file system may hold any time, Python none after the year 9999
        return f"{seconds} seconds after 1970.{rest:09d}"
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}.{rest:09d}"


def _bytes(header: Header, start: int, length: int) -> bytearray:
    """Read `length` bytes of the file from `start` on."""
    sample = bytearray(length)
    read_into(header, start, memoryview(sample))
    return sample
