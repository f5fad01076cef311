"""What the tests of the checkpoint room share: model folders, and a machine that stops at a chosen step."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

# Everything through which Bitwright's code changes what a restarted machine would find.
STEPS = ("replace", "rename", "fsync", "unlink", "rmdir", "mkdir", "truncate")


class Killed(BaseException):
    """The machine has stopped: nothing after this reaches the disk."""


@contextmanager
def stopping_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The file operations before number `step` are done; it and all later ones raise, even in a clean-up."""
    left = step

    def counted(operation: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object, **kwargs: object) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return operation(*args, **kwargs)

        return run

    with monkeypatch.context() as patched:
        for name in STEPS:
            patched.setattr(os, name, counted(getattr(os, name)))
        yield


@pytest.fixture
def killed_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], bool]:
    """`killed_at(step, action)`: runs an action on a machine that stops at a step; whether it came to that."""

    def run(step: int, action: Callable[[], object]) -> bool:
        with stopping_at(step, monkeypatch):
            try:
                action()
            except Killed:
                return True
        return False

    return run


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "embed.weight": torch.randn(16, 8, generator=generator).bfloat16(),
        "norm.weight": torch.randn(8, generator=generator),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0, 8),
        "codes": torch.randint(-128, 127, (3, 5, 2), dtype=torch.int8, generator=generator),
    }


@pytest.fixture
def model(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A model folder with one weight file."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny", "limit": float("inf")}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def sharded(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A model folder with two shards, a.safetensors and b.safetensors, and an index."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    names = sorted(tensors)
    homes = {name: "a.safetensors" if name < "e" else "b.safetensors" for name in names}
    for file in ("a.safetensors", "b.safetensors"):
        save_file({name: tensors[name] for name in names if homes[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    return folder
