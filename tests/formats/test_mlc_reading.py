"""MLC-LLM's folders read back: every preset, and every way in which a folder can be damaged."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import Checkpoints
from tests.golden import mlc_page

import bitwright
from bitwright import Recipe
from bitwright.core.engine_file import unlike
from bitwright.core.errors import CheckpointError
from bitwright.formats import QuantizedFolder
from bitwright.formats.mlc.reading import opened

INDEX, CONFIG, SHARD = "tensor-cache.json", "mlc-chat-config.json", "params_shard_0.bin"
WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
GATE = "model.layers.1.mlp.gate_proj"
Folders = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="module")
def folders(tiny: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """``folders(scheme)``: a quantized folder, and MLC's made of it; made once, nobody writes to them."""
    made: dict[str, tuple[Path, Path]] = {}

    def found(scheme: str, embeddings: str | None = None, tied: bool = False) -> tuple[Path, Path]:
        key = f"{scheme} {embeddings} {tied}"
        if key not in made:
            place = tmp_path_factory.mktemp("mlc")
            source = tiny("float16", tied=tied, **(WIDE if "128" in scheme else {}))
            bitwright.quantize(Recipe(str(source), scheme, "rtn"), place / "folder")
            bitwright.export(place / "folder", place / "mlc", format="mlc", embeddings=embeddings)
            made[key] = (place / "folder", place / "mlc")
        return made[key]

    return found


@pytest.mark.parametrize(("scheme", "embeddings"), [
    ("mlc:q4f16_1", None), ("mlc:q3f16_1", None), ("mlc:q2f16_1", None), ("W4A16g64sym", None), ("W3A16", None),
    ("W4A16g128", None), ("mlc:q4f16_1", "f16"),
])  # fmt: skip
def test_everything_is_found_again(scheme: str, embeddings: str | None, folders: Folders) -> None:
    folder, out = folders(scheme, embeddings, tied=scheme == "W3A16")
    model, file = QuantizedFolder.open(folder), opened(out)
    assert file.wanted is not None and file.misfiled is None
    assert {name: each.shape for name, each in file.tensors.items()} == dict(file.wanted.needed)
    assert file.checksums() == ([], []) and file.unlike(model.config) == []
    assert not [name for name in file.tensors if file.numbers(name) or not file.is_read(name)]
    tied = {"lm_head.weight"} if scheme == "W3A16" else set()
    assert set(file.names) == {*model.passed, *(f"{linear}.weight" for linear in model.linears)} - tied
    for linear in model.linears:
        weight = model.read(linear)
        assert [unlike(weight, rows, found) for rows, found in file.levels(f"{linear}.weight")] == [None]
    norm = "model.layers.1.input_layernorm.weight"
    assert torch.equal(*(one.half() for one in (model.tensor(norm), next(file.values(norm))[1])))


@pytest.mark.parametrize("scheme", ["mlc:q3f16_1", "W4A16g128"])
def test_values_are_those_of_a_reader_that_knows_the_page_alone(scheme: str, folders: Folders) -> None:
    _, out = folders(scheme)
    file, stored, said = opened(out), mlc_page.tensors(out), json.loads((out / CONFIG).read_text())
    for name, row in ((GATE, 0), (GATE.replace("gate", "up"), said["model_config"]["intermediate_size"])):
        ((rows, values),) = file.values(f"{name}.weight")
        page = mlc_page.weight(stored, "model.layers.1.mlp.gate_up_proj", said["quantization"], values.shape[1])
        np.testing.assert_allclose(values.numpy(), page[row : row + len(values)].astype(np.float32), rtol=1e-3)
        assert len(values) == said["model_config"]["intermediate_size"] and rows == slice(0, len(values))


def test_what_is_not_as_it_was_is_seen(folders: Folders) -> None:
    folder, out = folders("mlc:q4f16_1")
    weight, ((rows, found),) = QuantizedFolder.open(folder).read(GATE), opened(out).levels(f"{GATE}.weight")
    weight.codes[5, 9] ^= 1
    assert unlike(weight, rows, found) == "codes"
    weight.scale[5, 0] *= 2
    assert unlike(weight, rows, found) == "scales"


def indexed(change: Callable[[Any], Any], name: str = INDEX) -> Callable[[Path], Any]:
    def changed(folder: Path) -> None:
        said = json.loads((folder / name).read_text())
        change(said)
        (folder / name).write_text(json.dumps(said))

    return changed


def tensor(said: Any, at: int) -> Any:
    return said["records"][0]["records"][at]


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "shard": (lambda folder: (folder / SHARD).unlink(), r"params_shard_0\.bin is missing, which tensor-cache"),
    "short": (
        lambda folder: (folder / SHARD).write_bytes(bytes(9)),
        r"has 9 bytes, and tensor-cache\.json says",
    ),
    "index": (lambda folder: (folder / INDEX).unlink(), r"has no tensor-cache\.json, MLC-LLM's index"),
    "config": (lambda folder: (folder / CONFIG).unlink(), r"has no mlc-chat-config\.json"),
    "json": (lambda folder: (folder / INDEX).write_text("{"), r"not JSON"),
    "twice": (
        indexed(lambda said: tensor(said, 1).update(name=tensor(said, 0)["name"])),
        r"names model\.embed_tokens\.q_weight twice",
    ),
    "shape": (
        indexed(lambda said: tensor(said, 0).update(shape=[3, 3])),
        r"is uint32 \[3, 3\] and 8,192 bytes",
    ),
    "type": (indexed(lambda said: tensor(said, 0).update(dtype="e4m3")), r"is e4m3 .* which is not read"),
    "within": (indexed(lambda said: tensor(said, 1).update(byteOffset=4)), r"within another tensor or beyond its end"),
    "beyond": (indexed(lambda said: tensor(said, -1).update(byteOffset=10**9)), r"beyond its end"),
    "endless": (indexed(lambda said: tensor(said, 1).update(byteOffset=1e999)), r"is no index of MLC-LLM's weights"),
    "huge": (indexed(lambda said: tensor(said, 1).update(byteOffset=2**100)), r"a size or place that no file has"),
    "wrapped": (
        indexed(lambda said: tensor(said, 0).update(shape=[2**40, 2**40], nbytes=0)),
        r"and 0 bytes; the index is damaged",
    ),
    "ranks": (indexed(lambda said: tensor(said, 0).update(shape=[1] * 10**6)), r"a size or place that no file has"),
    "long": (lambda folder: os.truncate(folder / INDEX, 2**40), r"and such a file is never longer than"),
    "fewer": (indexed(lambda said: said["records"][0]["records"].pop()), r"has bytes after its last tensor"),
    "elsewhere": (indexed(lambda said: said["records"][0].update(dataPath="../x.bin")), r"no shard beside it"),
    "empty": (indexed(lambda said: said.pop("records")), r"is no index of MLC-LLM's weights"),
    "blocks": (
        indexed(lambda said: said["model_config"].update(num_hidden_layers=2**40), CONFIG),
        r"says there are \d+ blocks",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_one_clear_error(name: str, folders: Folders, tmp_path: Path) -> None:
    damage, says = DAMAGES[name]
    damage(copy := Path(shutil.copytree(folders("mlc:q4f16_1")[1], tmp_path / "copy")))
    with pytest.raises(CheckpointError, match=says):
        opened(copy)


def test_shards_that_changed_and_files_too_many_or_missing(folders: Folders, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folders("mlc:q4f16_1")[1], tmp_path / "copy"))
    raw = bytearray((copy / SHARD).read_bytes())
    raw[1000] ^= 16
    (copy / SHARD).write_bytes(raw)
    assert opened(copy).checksums() == (["params_shard_0.bin is not what its checksum says"], [])
    (copy / "tokenizer.json").unlink()
    assert opened(copy).misfiled == "tokenizer.json is missing, which mlc-chat-config.json names"
    (copy / "params_shard_7.bin").write_bytes(b"")
    assert opened(copy).misfiled == "params_shard_7.bin is not in the index"


def test_older_names_and_layouts_that_are_not_known(folders: Folders, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folders("mlc:q4f16_1")[1], tmp_path / "copy"))
    (copy / INDEX).rename(copy / "ndarray-cache.json")
    assert opened(copy).wanted is not None
    indexed(lambda said: said.update(quantization="q4f16_0"), CONFIG)(copy)
    file = opened(copy)
    assert file.unknown == "quantization q4f16_0 is not known here" and file.names == () and file.wanted is None
    assert file.is_read("model.norm.weight") and not file.is_read("lm_head.q_weight")
    indexed(lambda said: said.update(model_type="gemma3"), CONFIG)(copy)
    assert opened(copy).unknown == "model type gemma3 is not known here"


def test_settings_that_are_not_the_folders(folders: Folders) -> None:
    folder, out = folders("mlc:q4f16_1")
    config = dict(QuantizedFolder.open(folder).config) | {"rms_norm_eps": 0.5, "max_position_embeddings": 7}
    assert opened(out).unlike(config) == ["rms_norm_eps is 1e-06, the folder's 0.5"]
    assert opened(out).unlike(config | {"model_type": "mistral"}) == ["model_type is llama, the folder's mistral"]
