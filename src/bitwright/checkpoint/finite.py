"""NaN and infinity in a checkpoint, found before hours are spent on it."""

from collections.abc import Iterator

import torch

from bitwright.checkpoint.header import Header, TensorEntry
from bitwright.checkpoint.ranges import memory_of, pieces
from bitwright.checkpoint.strict_json import shown
from bitwright.core.errors import CheckpointError

CHUNK_BYTES = 64 * 2**20
NARROW_CHUNK_BYTES = CHUNK_BYTES // 4  # float8 has no min and max of its own and is widened to float32


def check_tensor(header: Header, entry: TensorEntry) -> None:
    """CheckpointError when the floating tensor `entry` has a NaN or an infinity, with how many of each."""
    if is_finite_tensor(header, entry):
        return
    nans = infinities = 0
    for chunk in _chunks(header, entry):
        nans += int(chunk.isnan().sum())
        infinities += int(chunk.isinf().sum())
    raise CheckpointError(
        f"{header.path}: tensor {shown(entry.name)} {list(entry.shape)} has {nans} NaN and {infinities} infinite of "
        f"its {entry.elements} values; the checkpoint is damaged, or was saved from a training run that had diverged: "
        "download it again"
    )


def is_finite_tensor(header: Header, entry: TensorEntry) -> bool:
    """Whether the floating tensor `entry` is finite throughout."""
    return all(is_finite(chunk) for chunk in _chunks(header, entry))


def is_finite(chunk: torch.Tensor) -> bool:
    """Whether a floating tensor is finite throughout: NaN and infinity show in its minimum or maximum."""
    low, high = torch.aminmax(chunk)
    return bool(low.isfinite() and high.isfinite())


def _chunks(header: Header, entry: TensorEntry) -> Iterator[torch.Tensor]:
    """The values of `entry` in pieces [elements] of at most 64 MiB. One buffer: a piece is gone when the next comes."""
    narrow = entry.dtype.itemsize == 1
    length = min(NARROW_CHUNK_BYTES if narrow else CHUNK_BYTES, entry.nbytes)
    buffer = torch.empty(length, dtype=torch.uint8, device="cpu")
    for piece in pieces(header, entry.start, entry.end, memory_of(buffer)):
        values = buffer[: piece.nbytes].view(entry.dtype)
        yield values.float() if narrow else values
