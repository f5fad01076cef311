"""Files of a model folder that are too long, endless, nested, or of impossible times: refused, or read, at once."""

import json
import os
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Checkpoints

import bitwright
from bitwright.checkpoint import header
from bitwright.checkpoint.account_file import read_account
from bitwright.checkpoint.header import MAX_HEADER_BYTES
from bitwright.checkpoint.layout import MAX_SHARDS, find_weights
from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.errors import CheckpointError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
YEAR_10_000 = 253_402_300_800


@pytest.fixture
def model(tiny: Checkpoints, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be made hostile."""
    return Path(shutil.copytree(tiny(), tmp_path / "model"))


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(folder)
    return str(error.value)


def change_config(model: Path, **changes: Any) -> None:
    config = json.loads((model / CONFIG).read_text())
    (model / CONFIG).write_text(json.dumps(config | changes))


def write_header(model: Path, raw: bytes, data_bytes: int = 0) -> None:
    with (model / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + data_bytes)


@pytest.mark.parametrize("name", [CONFIG, "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
class TestSmallFiles:
    def test_gigabytes(self, name: str, model: Path) -> None:
        (model / name).touch()
        os.truncate(model / name, 3 << 30)
        assert f"{name}: has 3,221,225,472 bytes, and such a file is never longer than" in refusal(model)

    def test_a_named_pipe(self, name: str, model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        os.mkfifo(model / name)
        assert f"{name}: a named pipe, not a regular file" in refusal(model)

    def test_a_device(self, name: str, model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        (model / name).symlink_to("/dev/zero")
        assert f"{name}: a device or a socket, not a regular file" in refusal(model)

    def test_millions_of_values(self, name: str, model: Path) -> None:
        (model / name).write_text('{"a": [' + "[]," * 3_000_000 + "[]]}")
        assert f"{name}: the JSON has about 6,000,003 values" in refusal(model)


def test_a_pipe_in_place_of_the_index(model: Path) -> None:
    (model / WEIGHTS).unlink()
    os.mkfifo(model / INDEX)
    assert f"{INDEX}: a named pipe" in refusal(model)


@pytest.mark.parametrize("levels", [150, 900, 100_000])
def test_nested_configs(levels: int, model: Path) -> None:
    (model / CONFIG).write_text('{"a": ' + "[" * levels + "]" * levels + "}")
    assert "nested too deeply" in refusal(model)


def test_many_shards(model: Path) -> None:
    (model / WEIGHTS).unlink()
    (model / INDEX).write_text(json.dumps({"weight_map": {str(n): f"{n}.safetensors" for n in range(MAX_SHARDS + 1)}}))
    assert "10,001 weight files or more; the largest models have far fewer" in refusal(model)


@pytest.mark.parametrize("outside", ["../model.safetensors", "/etc/passwd", "a/../../b.safetensors"])
def test_shards_outside(outside: str, model: Path) -> None:
    (model / WEIGHTS).unlink()
    (model / INDEX).write_text(json.dumps({"weight_map": {"a": outside}}))
    assert "which is outside of the model folder" in refusal(model)


class TestHeaders:
    def test_too_long(self, model: Path) -> None:
        os.truncate(model / WEIGHTS, 1 << 40)
        with (model / WEIGHTS).open("r+b") as file:
            file.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        assert "promise a header of 50000001 bytes" in refusal(model)

    def test_values_that_are_no_tensors(self, model: Path) -> None:
        write_header(model, b'{"a":[' + b"[]," * 2_000_000 + b"[]]}")
        assert "the JSON has about 4,000,003 values" in refusal(model)

    def test_more_tensors_than_any_model(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(header, "MAX_TENSORS", 20)
        assert "21 tensors in one file; more than 20 is never real" in refusal(model)

    def test_more_tensors_in_all_files_together(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("bitwright.checkpoint.layout.MAX_TENSORS", 30)
        shutil.copy(model / WEIGHTS, model / "model-2.safetensors")
        (model / WEIGHTS).rename(model / "model-1.safetensors")
        assert "42 tensors or more" in refusal(model)

    def test_long_names(self, model: Path) -> None:
        write_header(model, b'{"%s":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' % (b"a" * 2000))
        assert "a name of 2,000 characters" in refusal(model)

    def test_names_of_many_parts(self, model: Path) -> None:
        write_header(model, b'{"%s":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' % b".".join([b"a"] * 40))
        assert "a name of 79 characters in 40 parts" in refusal(model)

    @pytest.mark.parametrize("size", [0, 1])
    def test_very_many_tensors_of_next_to_nothing(self, size: int, model: Path) -> None:
        entries = {
            f"model.layers.0.mlp.experts.{n}.up_proj.weight": {
                "dtype": "U8", "shape": [size], "data_offsets": [n * size, (n + 1) * size],
            }
            for n in range(10_000)
        }  # fmt: skip
        write_header(model, json.dumps(entries).encode(), size * 10_000)
        assert f"10,000 tensors, and {size * 10_000:,} bytes for all of them" in refusal(model)

    def test_terabytes_with_a_sane_header(self, model: Path) -> None:
        side = 2**20
        entry = {"dtype": "BF16", "shape": [side, side], "data_offsets": [0, 2 * side * side]}
        write_header(model, json.dumps({"model.layers.0.mlp.up_proj.weight": entry}).encode(), 2 * side * side)
        assert bitwright.inspect(model).parameters == side * side


@pytest.mark.parametrize("seconds", [YEAR_10_000 + 5, -10, 2**63])
def test_times_that_python_has_no_date_for(seconds: int, model: Path) -> None:
    """File systems hold such times, though not every one does."""
    read, homes = find_weights(model)
    late = {name: replace(each, mtime_ns=seconds * 10**9) for name, each in read.items()}
    assert Checkpoint(model, {}, late, homes).modified()[WEIGHTS] == f"{seconds} seconds after 1970.000000000"


def test_an_account_that_is_a_pipe_is_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "bitwright.json")
    assert read_account(tmp_path) is None


def compressed(**changes: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "strategy": "group", "group_size": 32}
    groups = {"g": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups} | changes


@pytest.mark.parametrize(("config", "says"), [
    (compressed(ignore=["re:(.+)+$"]), "repeats what repeats or chooses already"),
    (compressed(ignore=["re:" + ".*a" * 30]), "repeats or chooses too often"),
    (compressed(ignore=["re:("]), "is no regular expression"),
    (compressed(ignore=[f"re:.*a{n}" for n in range(5000)]), "has 5,000 regular expressions"),
    (compressed(ignore=[f"a{n}" for n in range(200_000)]), "names and other texts, far more than there are tensors"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {"+:(a|a)*x": {}}}, "repeats what repeats"),
    ({"quant_method": "fp8", "modules_to_not_convert": ["(.*)*x"]}, "repeats what repeats"),
], ids=["nested", "many", "none", "count", "names", "rules", "others"])  # fmt: skip
def test_patterns_of_a_stranger(config: dict[str, Any], says: str, model: Path) -> None:
    change_config(model, quantization_config=config)
    assert says in refusal(model)
