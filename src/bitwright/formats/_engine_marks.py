"""Whether a path is an engine's own file or folder (gguf, mlc), told by what it looks like from outside."""

from pathlib import Path
from types import ModuleType

from bitwright.core.errors import CheckpointError
from bitwright.core.registry import find

MARKS = ("mlc-chat-config.json", "tensor-cache.json", "ndarray-cache.json")
"""A folder with one of these, and no config.json, is MLC-LLM's."""
SUFFIX = ".gguf"


def engine_format(path: Path) -> ModuleType | None:
    """The format of an engine's own file or folder, None for any other folder."""
    if path.is_file():
        return find("formats", "gguf")
    if any((path / mark).is_file() for mark in MARKS) and not (path / "config.json").is_file():
        return find("formats", "mlc")
    return None


def refuse_engine_file(path: Path) -> None:
    """Raises CheckpointError for an engine's own file or folder where the folder of a model is read."""
    if engine_format(path) is None or (path.is_file() and path.suffix != SUFFIX):
        return
    what = f"a {SUFFIX} file" if path.is_file() else "a folder of MLC-LLM"
    raise CheckpointError(
        f"{path}: is {what}, which Bitwright writes and verifies, but does not read as a model; name the folder that "
        "it was made of"
    )
