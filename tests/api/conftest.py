"""Folders compared byte by byte, and damaged tensor by tensor."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

TIMINGS = "bitwright-timings.json"
LETTERS = "the quick brown fox jumps over the lazy dog, 0123456789 times; "


def changed(folder: Path, place: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a folder with other tensors."""
    copy = Path(shutil.copytree(folder, place))
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 6400 bytes, which are as many tokens."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(LETTERS[n % 63 :] + LETTERS[: n % 63] for n in range(102))[:6400])
    return path


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, bytes]]:
    """``contents(folder)``: the bytes of every file of a result by name, save the one file that holds the clock."""

    def of(folder: Path) -> dict[str, bytes]:
        files = [path for path in folder.rglob("*") if path.is_file() and path.name != TIMINGS]
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    return of
