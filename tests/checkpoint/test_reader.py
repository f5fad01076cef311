import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bitwright.checkpoint import ranges
from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.errors import CheckpointError

INDEX = "model.safetensors.index.json"
Tensors = dict[str, torch.Tensor]


def write_index(folder: Path, homes: object) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": homes}))


@pytest.mark.parametrize("kind", ["model", "sharded"])
def test_a_checkpoint_is_what_was_saved(kind: str, tensors: Tensors, request: pytest.FixtureRequest) -> None:
    found = Checkpoint.open(request.getfixturevalue(kind))
    assert found.names == tuple(sorted(tensors))
    assert "codes" in found
    assert "absent" not in found
    assert found.total_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert found.dtype_of_weights == torch.bfloat16
    for name, tensor in tensors.items():
        assert found.entry(name).shape == tensor.shape
        assert found.nbytes(name) == tensor.nbytes
        read = found.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)


def test_a_tensor_read_is_a_copy_of_ones_own(model: Path, tensors: Tensors) -> None:
    found = Checkpoint.open(model)
    before = (model / "model.safetensors").read_bytes()
    found.read("norm.weight").zero_()
    assert torch.equal(found.read("norm.weight"), tensors["norm.weight"])
    assert (model / "model.safetensors").read_bytes() == before
    with torch.device("meta"):
        assert found.read("norm.weight").device.type == "cpu"


def test_config_is_there(model: Path) -> None:
    assert Checkpoint.open(model).config == {"model_type": "tiny", "limit": float("inf")}


def test_rows_are_read_alone(model: Path, tensors: Tensors) -> None:
    found = Checkpoint.open(model)
    for name, start, stop in (("embed.weight", 3, 9), ("codes", 1, 3), ("empty", 0, 0), ("norm.weight", 8, 8)):
        assert torch.equal(found.read_slice(name, start, stop), tensors[name][start:stop])
    for name, start, stop in (("codes", 0, 4), ("codes", 2, 1), ("codes", -1, 1), ("scalar", 0, 0)):
        with pytest.raises(ValueError, match="has no rows"):
            found.read_slice(name, start, stop)


def test_an_unknown_tensor_is_named_with_its_neighbour(model: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor 'norm\.weigh'.*did you mean norm\.weight"):
        Checkpoint.open(model).read("norm.weigh")


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        Checkpoint.open(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="a file, no model folder"):
        Checkpoint.open(tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"is no model folder: it has no config\.json"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(("text", "reason"), [("[]", "found a list"), ("{", "not JSON"), ("\ufeff{}", "not JSON")])
def test_a_config_that_is_none(model: Path, text: str, reason: str) -> None:
    (model / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=reason):
        Checkpoint.open(model)


def test_no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors; an interrupted download"):
        Checkpoint.open(model)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "x.pth"])
def test_pickled_weights_are_not_read_but_explained(model: Path, name: str) -> None:
    (model / "model.safetensors").rename(model / name)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(model)
    message = str(caught.value)
    assert name in message
    assert f"from_pretrained({str(model)!r}, use_safetensors=False)\n" in message
    assert "save_pretrained" in message


def test_missing_shards_are_listed(sharded: Path) -> None:
    (sharded / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of the 2 shards .* missing: b\.safetensors; .*[Dd]ownload"):
        Checkpoint.open(sharded)
    write_index(sharded, {str(n): f"{n:02d}.safetensors" for n in range(20)})
    with pytest.raises(CheckpointError, match=r"20 of the 20 .* 07\.safetensors and 12 more"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}'])
def test_an_index_without_a_map(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match="no weight_map"):
        Checkpoint.open(sharded)


def test_an_index_that_is_no_json(sharded: Path) -> None:
    (sharded / INDEX).write_text("<html>")
    with pytest.raises(CheckpointError, match=rf"{INDEX}: .*not JSON"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize(
    "file", ["../model/model.safetensors", "/etc/passwd", "a/../../b", "..", "", ".", "a\\b", "\0"]
)
def test_an_index_may_not_point_outside(sharded: Path, model: Path, file: str) -> None:
    write_index(sharded, {"codes": file})
    with pytest.raises(CheckpointError, match="outside of the model folder"):
        Checkpoint.open(sharded)


def test_index_and_shard_must_agree(sharded: Path) -> None:
    write_index(sharded, {"codes": "b.safetensors"})
    with pytest.raises(CheckpointError, match=r"'codes' is in b\.safetensors, but it is not"):
        Checkpoint.open(sharded)


def test_the_index_decides_what_belongs_to_the_model(sharded: Path) -> None:
    write_index(sharded, {"codes": "a.safetensors"})
    assert Checkpoint.open(sharded).names == ("codes",)


def test_links_are_followed_as_in_the_cache_of_the_hub(sharded: Path, tmp_path: Path, tensors: Tensors) -> None:
    (sharded / "a.safetensors").rename(tmp_path / "blob")
    (sharded / "a.safetensors").symlink_to(tmp_path / "blob")
    assert torch.equal(Checkpoint.open(sharded).read("codes"), tensors["codes"])
    (tmp_path / "blob").unlink()
    with pytest.raises(CheckpointError, match=r"1 of the 2 shards .* missing: a\.safetensors"):
        Checkpoint.open(sharded)


def test_shards_without_an_index(sharded: Path, tensors: Tensors) -> None:
    (sharded / INDEX).unlink()
    assert Checkpoint.open(sharded).names == tuple(sorted(tensors))
    save_file({"codes": tensors["codes"]}, sharded / "c.safetensors")
    with pytest.raises(CheckpointError, match=r"'codes' stands both in a\.safetensors and in c\.safetensors"):
        Checkpoint.open(sharded)


def test_a_damaged_shard_is_noticed_when_opened(sharded: Path) -> None:
    os.truncate(sharded / "b.safetensors", (sharded / "b.safetensors").stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"b\.safetensors: truncated"):
        Checkpoint.open(sharded)


def test_a_file_that_changes_under_the_run(model: Path) -> None:
    found, path = Checkpoint.open(model), model / "model.safetensors"
    times = path.stat()
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    with pytest.raises(CheckpointError, match=r"changed under the run: it was written to"):
        found.read("codes")
    with path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match=r"changed under the run: .* bytes when it was opened"):
        found.fingerprint()
    path.unlink()
    with pytest.raises(CheckpointError, match=r"cannot be read any more: .*put it back as it was"):
        found.check_finite()


def test_no_floating_tensor(model: Path, tensors: Tensors) -> None:
    save_file({"codes": tensors["codes"]}, model / "model.safetensors")
    with pytest.raises(CheckpointError, match="no tensor is floating point"):
        _ = Checkpoint.open(model).dtype_of_weights


def test_fingerprints_tell_checkpoints_apart(model: Path, sharded: Path) -> None:
    before = Checkpoint.open(model).fingerprint()
    assert set(before) == {"config.json", "model.safetensors"}
    assert before == Checkpoint.open(model).fingerprint()
    assert set(Checkpoint.open(sharded).fingerprint()) == {"config.json", INDEX, "a.safetensors", "b.safetensors"}
    (model / "config.json").write_text("{}")
    changed = Checkpoint.open(model).fingerprint()
    assert changed["config.json"] != before["config.json"]
    assert changed["model.safetensors"] == before["model.safetensors"]


@pytest.mark.parametrize("element", [0, 250_000, 499_999])
def test_a_fingerprint_sees_start_middle_and_end(model: Path, element: int) -> None:
    values = torch.zeros(500_000)
    save_file({"w": values}, model / "model.safetensors")
    before = Checkpoint.open(model).fingerprint()
    values[element] = 1
    save_file({"w": values}, model / "model.safetensors")
    assert Checkpoint.open(model).fingerprint() != before


def test_a_finite_checkpoint_passes_and_tells_its_progress(model: Path, tensors: Tensors) -> None:
    seen: list[tuple[int, int]] = []
    found = Checkpoint.open(model)
    found.check_finite(lambda done, total: seen.append((done, total)))
    assert len(seen) == len(tensors)
    assert seen == sorted(seen)
    assert seen[-1] == (found.total_bytes, found.total_bytes)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e5m2, torch.float8_e4m3fn]
)
def test_nan_and_infinity_are_counted(model: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "CHUNK_BYTES", 64)  # so that the tensor takes several chunks, the last one not full
    monkeypatch.setattr(ranges, "NARROW_CHUNK_BYTES", 16)
    values = torch.ones(7, 19)
    values[0, 0], values[6, 18], values[3, 3] = float("nan"), float("nan"), float("-inf")
    infinite = 0 if dtype == torch.float8_e4m3fn else 1  # that one has no infinity
    save_file({"fine": torch.ones(2), "spoilt": values.to(dtype)}, model / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor 'spoilt' .* 2 NaN and {infinite} infinite"):
        Checkpoint.open(model).check_finite()


def test_the_first_bad_tensor_in_the_file_is_named(model: Path) -> None:
    save_file({"b": torch.tensor([float("inf")]), "a": torch.tensor([1.0]), "c": torch.tensor([float("nan")])},
              model / "model.safetensors")  # fmt: skip
    with pytest.raises(CheckpointError, match=r"'b' .* 0 NaN and 1 infinite"):
        Checkpoint.open(model).check_finite()
