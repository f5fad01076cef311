"""Engines' own files pass as they were written; damaged in each way that is looked for they do not, and none of those
is published."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from safetensors.torch import load_file, save_file
from tests.conftest import Checkpoints

import bitwright
from bitwright.core.errors import CheckpointError, OutputError
from bitwright.core.recipe import Recipe
from bitwright.formats import gguf, mlc
from bitwright.formats.mlc import cache
from bitwright.verification.findings import Verification

FORMATS = {"gguf": ("m.gguf", "W4A16g32sym"), "mlc": ("mlc", "mlc:q4f16_1")}
Files = Callable[[str], Path]


@pytest.fixture(scope="module")
def source(tiny: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokenizer names a token that ends a text, as a GGUF file has to."""
    copy = Path(shutil.copytree(tiny(eos_token_id=1, bos_token_id=0), tmp_path_factory.mktemp("source") / "model"))
    said = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps(said | {"eos_token": "!"}))
    return copy


@pytest.fixture(scope="module")
def files(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """``files("gguf")``: a result in this format; nobody writes to it. ``files("gguf folder")``: what it is made of."""
    place = tmp_path_factory.mktemp("files")
    for format, (name, scheme) in FORMATS.items():
        bitwright.quantize(Recipe(str(source), scheme, "rtn"), place / f"{format} folder")
        found = bitwright.export(place / f"{format} folder", place / name, format=format)
        assert "7 linears read back, as they are in the folder" in found.verified
    return lambda what: place / FORMATS[what][0] if what in FORMATS else place / what


def copied(path: Path, to: Path) -> Path:
    return Path(shutil.copytree(path, to) if path.is_dir() else shutil.copy(path, to.with_suffix(".gguf")))


def failed(found: Verification) -> dict[str, str]:
    return {check.name: check.found for check in found.checks if check.passed is False}


def place_of(format: str, path: Path, name: str) -> tuple[Path, int, int]:
    """File, start and length of a tensor's bytes."""
    if format == "gguf":
        one = next(tensor for tensor in GGUFReader(path).tensors if tensor.name == name)
        return path, int(one.data_offset), int(one.n_bytes)
    record = cache.read_cache(path).records[name]
    return record.shard, record.start, record.nbytes


def overwritten(format: str, path: Path, name: str, data: bytes) -> None:
    file, start, _ = place_of(format, path, name)
    raw = bytearray(file.read_bytes())
    raw[start : start + len(data)] = data
    file.write_bytes(raw)


def test_no_digests_of_tensors_that_are_not_there(source: Path, tmp_path: Path) -> None:
    """They are of the folder that a file is made of."""
    for format, (name, scheme) in FORMATS.items():
        bitwright.quantize(Recipe(str(source), scheme, "rtn", format), tmp_path / name)
    said = (tmp_path / "mlc" / "bitwright.json").read_text()
    assert "weight_error" in said and "digest" not in said and "quantization_config" not in said
    bitwright.quantize(Recipe(str(source), "W4A16g32sym", "rtn"), tmp_path / "folder")
    assert "digest" in (tmp_path / "folder" / "bitwright.json").read_text()
    bitwright.export(tmp_path / "folder", tmp_path / "exported.gguf", format="gguf")
    for path in (tmp_path / "m.gguf", tmp_path / "exported.gguf"):
        field = GGUFReader(path).fields["bitwright.account"]
        account = bytes(field.parts[field.data[0]]).decode()
        assert "weight_error" in account and "digest" not in account and "quantization_config" not in account


@pytest.mark.parametrize("format", FORMATS)
def test_sound(format: str, files: Files, source: Path) -> None:
    alone = bitwright.verify(files(format))
    assert alone.passed and (alone.format, alone.linears, alone.bits_per_weight) == (format, 14, 4.5)
    assert alone.kl_divergence is None and alone.largest_error is None
    original = bitwright.verify(files(format), source)
    assert original.passed and {"settings", "all of the folder", "weights"} <= {one.name for one in original.checks}
    assert original.kl_divergence is not None and 0 < original.kl_divergence < 3
    assert original.largest_error is not None and original.mean_error is not None
    assert 0 < original.mean_error < original.largest_error < 0.02 and original.largest_in
    folder = bitwright.verify(files(format), files(f"{format} folder"))
    assert folder.passed and folder.kl_divergence is not None and folder.kl_divergence < original.kl_divergence
    assert (folder.largest_in is not None and "embed" in folder.largest_in) or "lm_head" in str(folder.largest_in)
    assert bitwright.verify(files(format), source, logits=False).kl_divergence is None


@pytest.mark.parametrize("scheme", ["W4A16g32", "W3A16g64", "W8A16sym"])
def test_the_codes_that_are_compared_are_those_of_every_scheme(scheme: str, source: Path, tmp_path: Path) -> None:
    result = bitwright.quantize(Recipe(str(source), scheme, "rtn", "gguf"), tmp_path / "m.gguf")
    assert "7 linears read back" in result.verified and bitwright.verify(tmp_path / "m.gguf", source).passed


def test_lossy_files_are_held_to_the_error_that_was_measured(source: Path, tmp_path: Path) -> None:
    bitwright.quantize(Recipe(str(source), "W4A16g32ic", "rtn"), tmp_path / "folder")
    for format in FORMATS:
        found = bitwright.export(tmp_path / "folder", tmp_path / format, format=format, lossy=True)
        assert found.codes_kept == 0 and "7 linears read back" in found.verified
        assert bitwright.verify(tmp_path / format, tmp_path / "folder").passed


def test_a_model_that_is_not_quantized(source: Path, tmp_path: Path) -> None:
    found = bitwright.export(source, tmp_path / "f16.gguf", format="gguf")
    assert "7 linears read back" in found.verified
    beside = bitwright.verify(tmp_path / "f16.gguf", source)
    assert beside.passed and beside.kl_divergence is not None and beside.kl_divergence < 1e-5


NAN = np.float16(np.nan).tobytes()


@pytest.mark.parametrize(("format", "name", "data", "says"), [
    ("gguf", "blk.1.attn_k.weight", NAN, "blk.1.attn_k.weight: NaN or infinite"),
    ("gguf", "blk.1.attn_norm.weight", np.float32(np.inf).tobytes(), "blk.1.attn_norm.weight: NaN or infinite"),
    ("gguf", "token_embd.weight", NAN, "token_embd.weight: NaN or infinite"),
    ("mlc", "model.layers.0.mlp.down_proj.q_scale", NAN, "down_proj.q_scale: NaN or infinite"),
    ("mlc", "model.norm.weight", NAN, "model.norm.weight: NaN or infinite"),
    ("mlc", "model.layers.0.mlp.down_proj.q_scale", bytes(2 * 64 * 6), "all its scales are zero"),
])  # fmt: skip
def test_numbers(format: str, name: str, data: bytes, says: str, files: Files, source: Path, tmp_path: Path) -> None:
    damaged = copied(files(format), tmp_path / "damaged")
    overwritten(format, damaged, name, data)
    for against in (None, source):
        found = bitwright.verify(damaged, against)
        assert says in failed(found)["scales and shapes"]
        assert ("checksums" in failed(found)) is (format == "mlc")


@pytest.mark.parametrize(("damage", "says"), [
    (lambda raw: raw[: len(raw) // 2], r"is cut short: .* ends at byte [\d,]+, the file at [\d,]+"),
    (lambda raw: b"GGML" + raw[4:], r"is no GGUF file: it begins with b'GGML'"),
    (lambda raw: raw[:100], r"is cut short, or damaged: it ends at byte 100"),
    (lambda raw: b"", r"is no GGUF file"),
], ids=["cut", "magic", "header", "empty"])  # fmt: skip
def test_a_file_that_cannot_be_read(damage: Callable[[bytes], bytes], says: str, files: Files, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(damage(files("gguf").read_bytes()))
    with pytest.raises(CheckpointError, match=says):
        bitwright.verify(tmp_path / "m.gguf")


def test_a_folder_of_mlc_that_cannot_be_read(files: Files, tmp_path: Path) -> None:
    damaged = copied(files("mlc"), tmp_path / "damaged")
    (damaged / "params_shard_0.bin").unlink()
    with pytest.raises(CheckpointError, match=r"params_shard_0\.bin is missing"):
        bitwright.verify(damaged)


def test_a_tensor_that_mlc_s_index_does_not_have(files: Files, source: Path, tmp_path: Path) -> None:
    damaged = copied(files("mlc"), tmp_path / "damaged")
    said = json.loads((damaged / "tensor-cache.json").read_text())
    for one in said["records"][0]["records"]:
        one["name"] = one["name"].replace("layers.1.mlp.gate_up", "layers.1.mlp.up_gate")
    (damaged / "tensor-cache.json").write_text(json.dumps(said))
    found = bitwright.verify(damaged)
    assert failed(found) == {"complete": "model.layers.1.mlp.gate_up_proj.q_scale is not there, and 1 other"}
    assert failed(bitwright.verify(damaged, source))["all of the folder"].startswith("model.layers.1.mlp.gate_proj.w")


@pytest.mark.parametrize("format", FORMATS)
def test_the_weights_of_another_linear(format: str, files: Files, source: Path, tmp_path: Path) -> None:
    """Everything is there and finite; only the folder shows it."""
    damaged = copied(files(format), tmp_path / "damaged")
    here, there = "blk.0.ffn_gate.weight", "blk.1.ffn_gate.weight"
    if format == "mlc":
        here, there = (f"model.layers.{n}.mlp.down_proj.q_weight" for n in range(2))
    file, start, nbytes = place_of(format, damaged, there)
    overwritten(format, damaged, here, file.read_bytes()[start : start + nbytes])
    if format == "gguf":
        assert bitwright.verify(damaged).passed
    for against in (source, files(f"{format} folder")):
        found = bitwright.verify(damaged, against)
        assert "layers.0.mlp" in failed(found)["weights"] and found.kl_divergence is None


def test_scales_that_were_moved_are_not_another_model(files: Files, source: Path, tmp_path: Path) -> None:
    """The function stays, norms and the linears after them change: the weights of the original are no measure then."""
    moved = copied(source, tmp_path / "moved")
    tensors = load_file(moved / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"] /= 4
    for one in "qkv":
        tensors[f"model.layers.0.self_attn.{one}_proj.weight"] *= 4
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    bitwright.quantize(Recipe(str(moved), "W4A16g32sym", "rtn", "gguf"), tmp_path / "m.gguf")
    found = bitwright.verify(tmp_path / "m.gguf", source)
    assert found.passed and found.largest_error is not None and found.largest_error > 1
    assert any("scales were moved between tensors" in check.found for check in found.checks)
    blind = bitwright.verify(tmp_path / "m.gguf", source, logits=False)
    assert failed(blind).keys() == {"weights"} and blind.largest_error == found.largest_error
    assert failed(blind)["weights"].startswith("not decided: ") and "leave --no-logits out" in failed(blind)["weights"]
    assert bitwright.verify(tmp_path / "m.gguf", moved, logits=False).passed


@pytest.mark.parametrize("format", FORMATS)
def test_another_model_of_the_same_shapes(format: str, files: Files, source: Path, tmp_path: Path) -> None:
    """Every weight is another one, norms too: without logits nothing tells it from scales that were moved."""
    other = copied(source, tmp_path / "other")
    tensors = {name: tensor.flip(0).contiguous() for name, tensor in load_file(other / "model.safetensors").items()}
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert "weights" in failed(bitwright.verify(files(format), other, logits=False))


@pytest.mark.parametrize("format", FORMATS)
def test_beside_another_model(format: str, files: Files, tiny: Checkpoints, source: Path, tmp_path: Path) -> None:
    found = failed(bitwright.verify(files(format), tiny(num_hidden_layers=3)))
    assert found["all of the folder"].startswith("model.layers.2.")
    assert ("block_count is 2" if format == "gguf" else "num_hidden_layers is 2") in found["settings"]
    other = copied(source, tmp_path / "other")
    said = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(said | {"rms_norm_eps": 0.25}))
    found = failed(bitwright.verify(files(format), other))
    assert list(found) == ["settings"] and "the folder's 0.25" in found["settings"]


@pytest.mark.parametrize(("format", "module", "function"), [
    ("gguf", "bitwright.formats.gguf.weights", "packed"), ("mlc", "bitwright.formats.mlc.presets", "packed"),
])  # fmt: skip
def test_other_codes_are_not_published(
    format: str, module: str, function: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = getattr(mlc.presets if format == "mlc" else gguf.weights, function)

    def shifted(weight: Any, *args: Any) -> Any:
        if isinstance(weight, torch.Tensor):
            return packed(weight.roll(1, 1), *args)
        return packed(type(weight)(weight.codes.roll(1, 1), weight.scale, None, weight.grid, weight.tile), *args)

    monkeypatch.setattr(f"{module}.{function}", shifted)
    out = tmp_path / FORMATS[format][0]
    with pytest.raises(OutputError, match=r"not published: written weights: .*: codes are not those of the folder"):
        bitwright.quantize(Recipe(str(source), FORMATS[format][1], "rtn", format), out, workers=1)
    assert not out.exists()


def cut(place: Path) -> None:
    file = place if place.is_file() else place / "params_shard_0.bin"
    file.write_bytes(file.read_bytes()[:-7])


def nan(format: str) -> Callable[[Path], None]:
    name = "blk.1.attn_v.weight" if format == "gguf" else "model.layers.1.self_attn.o_proj.q_scale"
    return lambda place: overwritten(format, place, name, NAN)


@pytest.mark.parametrize(("format", "damage", "says"), [
    ("gguf", cut, r"readable: .* is cut short"),
    ("mlc", cut, r"readable: .* has [\d,]+ bytes"),
    ("gguf", nan("gguf"), r"scales and shapes: blk\.1\.attn_v\.weight: NaN or infinite"),
    ("mlc", nan("mlc"), r"scales and shapes: .*o_proj\.q_scale: NaN or infinite"),
], ids=["gguf-cut", "mlc-cut", "gguf-nan", "mlc-nan"])  # fmt: skip
def test_what_a_disk_did_to_it_is_not_published(
    format: str,
    damage: Callable[[Path], None],
    says: str,
    files: Files,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written: ModuleType = {"gguf": gguf, "mlc": mlc}[format]
    write = written.write

    def damaged(model: Any, place: Path, *args: Any) -> Any:
        found = write(model, place, *args)
        damage(place)
        return found

    monkeypatch.setattr(written, "FORMAT", replace(written.FORMAT, write=damaged))
    out = tmp_path / FORMATS[format][0]
    with pytest.raises(OutputError, match=f"not published: {says}"):
        bitwright.export(files(f"{format} folder"), out, format=format)
    assert not out.exists()


def test_files_of_architectures_that_are_not_known(files: Files, source: Path, tmp_path: Path) -> None:
    raw = files("gguf").read_bytes()
    key = b"general.architecture\x08\x00\x00\x00\x05\x00\x00\x00\x00\x00\x00\x00llama"
    assert raw.count(key) == 1
    (tmp_path / "m.gguf").write_bytes(raw.replace(key, key[:-5] + b"phi99"))
    found = bitwright.verify(tmp_path / "m.gguf")
    assert not (found.failed or found.passed) and found.checks[0].passed is None
    assert found.checks[0].found == "not looked at: architecture phi99 is not known here"
    with pytest.raises(CheckpointError, match=r"cannot be compared with .*: architecture phi99 is not known here"):
        bitwright.verify(tmp_path / "m.gguf", source)


def number(raw: bytes, key: str, value: int) -> bytes:
    """A GGUF header with another number (uint32) under a key."""
    at = raw.index(key.encode()) + len(key) + 4
    return raw[:at] + value.to_bytes(4, "little") + raw[at + 4 :]


@pytest.mark.parametrize("key", ["llama.embedding_length", "llama.attention.head_count", "llama.block_count"])
def test_sizes_that_no_model_has(key: str, files: Files, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(number(files("gguf").read_bytes(), key, 0))
    with pytest.raises(CheckpointError, match=f"{key} is 0, and a model has at least 1"):
        bitwright.verify(tmp_path / "m.gguf")


def test_a_file_without_tensors(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "m.gguf", "phi99")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="has no tensor at all"):
        bitwright.verify(tmp_path / "m.gguf")


def test_shards_without_checksums(files: Files, source: Path, tmp_path: Path) -> None:
    folder = copied(files("mlc"), tmp_path / "mlc")
    index = folder / cache.INDICES[0]
    stated = json.loads(index.read_text())
    stated["records"][0]["md5sum"] = None
    index.write_text(json.dumps(stated))
    alone, beside = bitwright.verify(folder), bitwright.verify(folder, source)
    for found in (alone, beside):
        (check,) = [check for check in found.checks if check.name == "checksums"]
        assert check.passed is None and "no checksum of params_shard_0.bin" in check.found
    assert not alone.failed and not alone.passed  # nothing else tells whether the codes are those that were written
    assert beside.passed
