import errno
import json
import os
import resource
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bitwright.checkpoint.ranges import file_digest
from bitwright.checkpoint.writer import (
    LARGE_BYTES,
    atomic,
    copy_file,
    free_bytes,
    temporary_name,
    write_json,
    write_tensors,
    write_text,
)
from bitwright.core.errors import CheckpointError, OutputError

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file may grow beyond 1000 bytes, as the kernel sees to it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_tensors_come_back(tmp_path: Path, tensors: Tensors) -> None:
    path = tmp_path / "x.safetensors"
    assert write_tensors(path, tensors, {"format": "pt"}) == file_digest(path)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert list(tmp_path.iterdir()) == [path]


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path, tensors: Tensors) -> None:
    metadata = {str(n): "x" for n in range(20)}
    write_tensors(tmp_path / "a", tensors, metadata)
    write_tensors(tmp_path / "b", dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_any_tensor_will_do(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    write_tensors(tmp_path / "x", {"transposed": weight.T, "shared": weight, "again": weight, "row": weight[1]})
    found = load_file(tmp_path / "x")
    assert torch.equal(found["transposed"], weight.detach().T)
    assert torch.equal(found["row"], weight.detach()[1])


def test_what_the_format_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="__metadata__"):
        write_tensors(tmp_path / "x", {"__metadata__": torch.ones(1)})
    with pytest.raises(TypeError, match=r"x: safetensors files hold no torch\.complex128"):
        write_tensors(tmp_path / "x", {"x": torch.ones(1, dtype=torch.complex128)})
    assert not list(tmp_path.iterdir())


def test_text_and_json(tmp_path: Path) -> None:
    assert write_text(tmp_path / "t", "é\n") == 3
    assert (tmp_path / "t").read_text("utf-8") == "é\n"
    size = write_json(tmp_path / "j", {"b": [1], "a": "é"})
    assert json.loads((tmp_path / "j").read_text("utf-8")) == {"b": [1], "a": "é"}
    assert (tmp_path / "j").stat().st_size == size


def test_copies(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"123")
    assert copy_file(tmp_path / "a", tmp_path / "b") == 3
    assert (tmp_path / "b").read_bytes() == b"123"
    with pytest.raises(CheckpointError, match="absent: cannot be read"):
        copy_file(tmp_path / "absent", tmp_path / "c")


def test_a_kernel_that_takes_no_more(tmp_path: Path, small_disk: None) -> None:
    path = tmp_path / "x"
    write_text(path, "old")
    for write in (partial(write_tensors, path, {"w": torch.ones(5000)}), partial(write_text, path, "x" * 5000)):
        with pytest.raises(OutputError, match=r"writing \d{4,5} bytes failed: .*; \d+ bytes are free there"):
            write()
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "old"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk(tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(os, step, full)
        with pytest.raises(OutputError) as caught:
            write_text(tmp_path / "x", "12345")
    message = str(caught.value)
    assert f"{tmp_path / 'x'}: writing 5 bytes failed: No space left on device" in message
    assert "Nothing half-written was left; make room" in message
    assert not list(tmp_path.iterdir())


def test_folders_that_are_not_there_or_in_the_way(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file"):
        write_text(tmp_path / "absent" / "x", "1")
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputError, match="taken: writing 1 bytes failed: Is a directory"):
        write_text(tmp_path / "taken", "1")
    assert list(tmp_path.iterdir()) == [tmp_path / "taken"]


def test_an_exception_in_the_body_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic(tmp_path / "x", 1) as file:
        file.write(b"1")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_killed_at_every_step_a_file_is_old_or_new(
    tmp_path: Path, killed_at: Callable[[int, Callable[[], object]], bool]
) -> None:
    path, step = tmp_path / "x", 0
    seen = set()
    write_text(path, "old")
    while killed_at(step, lambda: write_text(path, "new")):
        seen.add(path.read_text())
        write_text(path, "old")
        assert list(tmp_path.iterdir()) == [path]
        step += 1
    assert step >= 3
    assert seen == {"old", "new"}


def test_a_file_system_that_cannot_sync_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.fsync, []

    def only_files(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    write_text(tmp_path / "x", "1")
    assert len(calls) == 2
    assert (tmp_path / "x").read_text() == "1"


def test_free_bytes_of_a_place_to_be(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "not" / "yet") > 0
    assert temporary_name(tmp_path / "x").parent == tmp_path


def test_a_single_element_of_any_stride_is_written(tmp_path: Path) -> None:
    """A transposed column of one word counts as contiguous, whatever its stride."""
    tensor = torch.tensor([[1, 2, 3]], dtype=torch.int32).t()[:1]
    assert tensor.is_contiguous()
    write_tensors(tmp_path / "x.safetensors", {"a": tensor.as_strided((1, 1), (1, 3))})
    assert load_file(tmp_path / "x.safetensors")["a"].tolist() == [[1]]


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system knows no such advice")
def test_large_files_are_not_kept_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advised: list[int] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *_: advised.append(os.fstat(file).st_size))
    for elements in (1, LARGE_BYTES):
        write_tensors(tmp_path / "x", {"w": torch.zeros(elements, dtype=torch.uint8)})
    assert advised == [(tmp_path / "x").stat().st_size], (
        "durable and whole when it is let go of, and only the large one"
    )
