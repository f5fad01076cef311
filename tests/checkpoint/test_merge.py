import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from bitwright.checkpoint import ranges
from bitwright.checkpoint.header import read_header
from bitwright.checkpoint.merge import merge_begun, merge_shards
from bitwright.checkpoint.ranges import Stored, pieces
from bitwright.checkpoint.reader import Checkpoint
from bitwright.checkpoint.writer import write_tensors
from bitwright.core.errors import CheckpointError, OutputError

KilledAt = Callable[[int, Callable[[], object]], bool]
INDEX = "model.safetensors.index.json"


def part_tensors(number: int) -> dict[str, torch.Tensor]:
    """320 bytes: one tensor of 64, one of 256."""
    generator = torch.Generator().manual_seed(number)
    return {
        f"block.{number}.scale": torch.randn(32, generator=generator).bfloat16(),
        f"block.{number}.codes": torch.randint(0, 99, (8, 8), dtype=torch.int32, generator=generator),
    }


ALL = {name: tensor for number in range(5) for name, tensor in part_tensors(number).items()}


def make(root: Path) -> tuple[list[Path], Path]:
    """Five parts (and one without a tensor) in root/work, and an empty root/result."""
    (root / "work").mkdir(parents=True)
    (root / "result").mkdir()
    parts = [root / "work" / f"part-{number}.safetensors" for number in range(6)]
    for number, part in enumerate(parts):
        write_tensors(part, part_tensors(number) if number < 5 else {})
    return parts, root / "result"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(".tmp")}


def test_everything_in_one_file_is_what_the_library_would_write(tmp_path: Path) -> None:
    parts, folder = make(tmp_path)
    merge_shards(parts, folder, 5 * 320)
    assert contents(folder) == {"model.safetensors": save(ALL, metadata={"format": "pt"})}
    assert not any(part.exists() for part in parts)
    assert merge_begun(tmp_path / "work")


@pytest.mark.parametrize(("shard_bytes", "shards"), [(1599, 2), (640, 3), (600, 4), (320, 5), (100, 10), (1, 10)])
def test_shards(tmp_path: Path, shard_bytes: int, shards: int) -> None:
    parts, folder = make(tmp_path)
    merge_shards(parts, folder, shard_bytes)
    index = json.loads((folder / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{number:05d}-of-{shards:05d}.safetensors" for number in range(1, shards + 1)]
    assert sorted(contents(folder)) == [*files, INDEX]
    assert index["metadata"] == {"total_size": 5 * 320}
    (folder / "config.json").write_text("{}")
    found = Checkpoint.open(folder)
    assert found.names == tuple(sorted(ALL))
    assert all(torch.equal(found.read(name), tensor) for name, tensor in ALL.items())
    for file in files:
        held = load_file(folder / file)
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= shard_bytes


@pytest.mark.parametrize("shard_bytes", [5 * 320, 640, 400])
def test_killed_at_every_step_the_merge_goes_on_to_the_same_bytes(
    tmp_path: Path, killed_at: KilledAt, shard_bytes: int
) -> None:
    parts, folder = make(tmp_path / "whole")
    merge_shards(parts, folder, shard_bytes)
    expected, step = contents(folder), 0
    while True:
        parts, folder = make(tmp_path / f"{step}")
        if not killed_at(step, partial(merge_shards, parts, folder, shard_bytes)):
            break
        killed_at(2 * step % 7, partial(merge_shards, parts, folder, shard_bytes))
        merge_shards(parts, folder, shard_bytes)
        assert contents(folder) == expected
        assert not any(part.exists() for part in parts)
        merge_shards(parts, folder, shard_bytes)  # killed before it could say that it was done
        assert contents(folder) == expected
        step += 1
    assert step > 10


@pytest.mark.parametrize("shard_bytes", [5 * 320, 400])
def test_tensors_in_no_part_are_copied_from_where_they_lie(
    tmp_path: Path, killed_at: KilledAt, shard_bytes: int
) -> None:
    """The same bytes as from parts, killed at every step; they stay, and may have moved before the merge goes on."""
    whole, folder = make(tmp_path / "whole")
    merge_shards(whole, folder, shard_bytes)
    expected, step = contents(folder), 0

    def kept(original: Path) -> list[Stored]:
        header = read_header(original)
        return [Stored(header, entry) for entry in sorted(header.entries.values(), key=lambda entry: entry.start)]

    while True:
        (first, *parts), folder = make(tmp_path / f"{step}")
        original = first.rename(tmp_path / f"{step}" / "original.safetensors")
        was, others = original.read_bytes(), kept(original)
        if not killed_at(step, partial(merge_shards, parts, folder, shard_bytes, others)):
            break
        original = original.rename(original.with_name("moved.safetensors"))
        merge_shards(parts, folder, shard_bytes, kept(original))
        assert contents(folder) == expected
        assert original.read_bytes() == was and not any(part.exists() for part in parts)
        step += 1
    assert step > 10


def test_tensors_in_no_part_that_have_changed_are_refused(tmp_path: Path) -> None:
    (first, *parts), folder = make(tmp_path)
    header = read_header(first.rename(tmp_path / "original.safetensors"))
    others = [Stored(header, entry) for entry in header.entries.values()]
    with (tmp_path / "original.safetensors").open("ab") as file:
        file.write(b"more")
    with pytest.raises(CheckpointError, match=r"original\.safetensors: changed under the run"):
        merge_shards(parts, folder, 640, others)


def test_a_tensor_in_a_part_and_in_none_is_refused(tmp_path: Path) -> None:
    parts, folder = make(tmp_path)
    header = read_header(parts[0])
    with pytest.raises(CheckpointError, match=r"part-0\.safetensors: tensor 'block.0.*stands in the original too"):
        merge_shards(parts, folder, 640, [Stored(header, entry) for entry in header.entries.values()])


def test_killed_while_data_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, expected = make(tmp_path / "whole")
    merge_shards(whole, expected, 640)
    for copied in range(10):
        parts, folder = make(tmp_path / str(copied))
        left = copied

        def stopping(*arguments: Any) -> Iterator[memoryview]:
            nonlocal left
            for piece in pieces(*arguments):
                left -= 1
                if left < 0:
                    raise KeyboardInterrupt
                yield piece

        with monkeypatch.context() as patched:
            patched.setattr(ranges, "pieces", stopping)
            with pytest.raises(KeyboardInterrupt):
                merge_shards(parts, folder, 640)
        merge_shards(parts, folder, 640)
        assert contents(folder) == contents(expected)


def test_no_part_goes_before_its_shard_is_there(tmp_path: Path, killed_at: KilledAt) -> None:
    """At any moment every tensor can be read, from a shard or from a part."""
    step = 0
    while True:
        parts, folder = make(tmp_path / f"{step}")
        killed = killed_at(step, partial(merge_shards, parts, folder, 400))
        left = [path for place in (parts[0].parent, folder) for path in place.glob("[!.]*.safetensors")]
        found = {name: tensor for path in left for name, tensor in load_file(path).items()}
        assert found.keys() == ALL.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in ALL.items())
        if not killed:
            break
        step += 1
    assert step > 10


def test_a_full_disk_is_reported_and_the_merge_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, folder = make(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    merged = []

    def second_shard_fails(*arguments: Any) -> Iterator[memoryview]:
        merged.append(arguments)
        if len(merged) > 4:
            monkeypatch.setattr("os.fsync", full)
        return pieces(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(ranges, "pieces", second_shard_fails)
        with pytest.raises(OutputError, match=r"model-00002-of-00003\.safetensors: writing \d+ bytes failed: No space"):
            merge_shards(parts, folder, 640)
    monkeypatch.undo()
    assert sorted(contents(folder)) == ["model-00001-of-00003.safetensors"]
    merge_shards(parts, folder, 640)
    assert len(contents(folder)) == 4


def test_parts_that_share_a_tensor(tmp_path: Path) -> None:
    parts, folder = make(tmp_path)
    write_tensors(parts[4], part_tensors(0))
    with pytest.raises(
        CheckpointError, match=r"part-4\.safetensors: tensor 'block\.0.* stands in part-0\.safetensors too"
    ):
        merge_shards(parts, folder, 640)
    assert not merge_begun(tmp_path / "work")


def test_a_part_that_is_missing_or_damaged(tmp_path: Path) -> None:
    parts, folder = make(tmp_path)
    parts[3].unlink()
    with pytest.raises(CheckpointError, match=r"part-3\.safetensors: cannot be read"):
        merge_shards(parts, folder, 640)
    parts[3].write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"part-3\.safetensors: no safetensors file"):
        merge_shards(parts, folder, 640)
    assert not contents(folder)


def begun(tmp_path: Path, killed_at: KilledAt) -> tuple[list[Path], Path]:
    """A merge whose plan is on disk, and nothing else."""
    parts, folder = make(tmp_path)
    assert killed_at(4, lambda: merge_shards(parts, folder, 640))
    assert merge_begun(tmp_path / "work")
    assert all(part.exists() for part in parts)
    return parts, folder


def test_a_merge_goes_on_only_as_it_was_begun(tmp_path: Path, killed_at: KilledAt) -> None:
    parts, folder = begun(tmp_path, killed_at)
    with pytest.raises(OutputError, match="6 parts into shards of 640 bytes has begun, now 6 parts and 641"):
        merge_shards(parts, folder, 641)
    with pytest.raises(OutputError, match="now 5 parts and 640 bytes are asked"):
        merge_shards(parts[:5], folder, 640)


def test_parts_exchanged_after_the_plan(tmp_path: Path, killed_at: KilledAt) -> None:
    parts, folder = begun(tmp_path, killed_at)
    write_tensors(parts[0], {"other": torch.ones(1)})
    with pytest.raises(OutputError, match=r"the parts of model-00001-of-00003\.safetensors changed"):
        merge_shards(parts, folder, 640)


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"parts": [], "shard_bytes": 1, "shards": [{}]}'])
def test_a_plan_that_is_none(tmp_path: Path, text: str) -> None:
    parts, folder = make(tmp_path)
    (tmp_path / "work" / "merge.json").write_text(text)
    with pytest.raises(OutputError, match=r"not the plan of a merge .*--restart"):
        merge_shards(parts, folder, 640)


def test_a_shard_of_another_model_is_not_taken_for_a_finished_one(tmp_path: Path) -> None:
    parts, folder = make(tmp_path)
    write_tensors(folder / "model.safetensors", {"other": torch.ones(3)})
    merge_shards(parts, folder, 10**9)
    assert load_file(folder / "model.safetensors").keys() == ALL.keys()


def test_calls_that_cannot_be_meant(tmp_path: Path) -> None:
    parts, folder = make(tmp_path)
    for wrong, size in (([], 640), (parts, 0), ([*parts, folder / "x"], 640)):
        with pytest.raises(ValueError, match="expected"):
            merge_shards(wrong, folder, size)
    alone = folder / "model.safetensors"
    parts[0].rename(alone)
    with pytest.raises(ValueError, match="called as a shard will be"):
        merge_shards([alone], folder, 640)
    assert alone.exists()


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system knows no such advice")
def test_memory_that_parts_are_kept_in_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, folder = make(tmp_path)
    advised: dict[int, list[tuple[int, int]]] = {}

    def advise(file: int, start: int, nbytes: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_DONTNEED
        advised.setdefault(os.fstat(file).st_ino, []).append((start, nbytes))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    expected = {
        part.stat().st_ino: sorted((entry.start, entry.nbytes) for entry in entries)
        for part in parts
        if (entries := read_header(part).entries.values())
    }
    merge_shards(parts, folder, 10**9)
    assert {part: sorted(ranges) for part, ranges in advised.items()} == expected
