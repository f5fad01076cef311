"""Read a stranger's small file whole: only a regular file, and only up to a stated number of bytes."""

import os
import stat
from pathlib import Path

from bitwright.core.errors import CheckpointError, UserError

MIB = 2**20
CONFIG_BYTES = 32 * MIB
"""The most bytes of a config.json; that of a mixture of 60,000 experts, each named in it, has 5 MiB."""
SMALL_BYTES = 64 * MIB
"""The most bytes of any other small file; the largest tokenizer.json that is known has 35 MiB."""


def read_small(path: Path, most: int = SMALL_BYTES, error: type[UserError] = CheckpointError) -> bytes:
    """Read a file of at most ``most`` bytes.

    Raises ``error`` for a longer one, for what is no regular file (a pipe would be waited for, a device may have no
    end), and for a file that cannot be read.
    """
    try:
        require_regular(path, error)
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            raw = b"" if size > most else file.read(most + 1)
    except (OSError, ValueError) as fault:  # ValueError: a path that no file can have
        raise error(f"{path}: cannot be read: {fault}") from fault
    if max(size, len(raw)) > most:
        raise error(
            f"{path}: has {max(size, len(raw)):,} bytes, and such a file is never longer than {most:,}; it is damaged, "
            "or no such file: take it from where it came from again"
        )
    return raw


def require_regular(path: Path, error: type[UserError] = CheckpointError) -> None:
    """Raise ``error`` for a named pipe, a socket or a device. Raises OSError if there is nothing."""
    mode = path.stat().st_mode  # asked before it is opened, because opening a pipe would wait for ever
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        kind = "a named pipe" if stat.S_ISFIFO(mode) else "a device or a socket"
        raise error(f"{path}: {kind}, not a regular file; put the file itself there")
