"""--base: metadata of an existing file with other weights, and files of other models refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from safetensors.torch import load_file, save_file
from tests.formats.gguf.conftest import Models

import bitwright
from bitwright.core.errors import CheckpointError, RecipeError
from bitwright.core.quantized import WriteOptions
from bitwright.formats import QuantizedFolder, gguf


@pytest.fixture
def base(model: Models, tmp_path: Path) -> Path:
    """The model in 16 bits with a line of its own, a rotary tensor, and an account that is not of the new file."""
    plain, path = tmp_path / "plain.gguf", tmp_path / "base.gguf"
    gguf.write(QuantizedFolder.open(model("llama")), plain, WriteOptions(account={"of": "another"}))
    return again(plain, path, {"general.author": "somebody"}, {"rope_freqs.weight": np.arange(8, dtype=np.float32)})


def again(
    source: Path, target: Path, texts: dict[str, str], tensors: dict[str, np.ndarray], without: str = "-"
) -> Path:
    """A copy of a file by the library alone, with more in it."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF", "general.architecture")):
            of = field.types[-1] if field.types[0] is GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], of)
    for key, value in texts.items():
        writer.add_string(key, value)
    for tensor in reader.tensors:
        if tensor.name != without and tensor.name not in tensors:
            writer.add_tensor(tensor.name, np.array(tensor.data))
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_metadata_come_from_the_base_and_weights_from_the_folder(base: Path, quantized: Models, tmp_path: Path) -> None:
    folder = quantized("llama", "W4A16g32sym")
    for name, options in (("own", WriteOptions()), ("based", WriteOptions(base=base, account={"of": "this"}))):
        gguf.write(QuantizedFolder.open(folder), tmp_path / name, options)
    own, based, old = (GGUFReader(path) for path in (tmp_path / "own", tmp_path / "based", base))
    taken = {name: field.contents() for name, field in based.fields.items()}
    for name, field in old.fields.items():
        if not name.startswith(("GGUF", "bitwright", "general.file_type")):
            assert taken[name] == field.contents()
    assert (taken["general.author"], taken["bitwright.account"]) == ("somebody", '{"of":"this"}')
    assert taken["general.file_type"] == own.fields["general.file_type"].contents() == 2
    weights = {each.name: np.array(each.data) for each in based.tensors}
    assert np.array_equal(weights.pop("rope_freqs.weight"), np.arange(8))
    assert weights.keys() == {each.name for each in own.tensors}
    assert all(np.array_equal(weights[each.name], each.data) for each in own.tensors)


def test_with_a_base_the_folders_tokenizer_is_not_looked_at(base: Path, model: Models, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model("llama"), tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*")))
    config = QuantizedFolder.open(folder).config
    with pytest.raises(RecipeError, match="neither"):
        gguf.check(config, folder, WriteOptions())
    gguf.check(config, folder, WriteOptions(base=base))


def test_a_base_of_another_model_is_refused(base: Path, quantized: Models, tmp_path: Path) -> None:
    def refused(folder: Path, base: Path, says: str) -> None:
        found = QuantizedFolder.open(folder)
        with pytest.raises(RecipeError, match=says):
            gguf.check(found.config, folder, WriteOptions(base=base))
        with pytest.raises(RecipeError, match=says):
            gguf.write(found, tmp_path / "m.gguf", WriteOptions(base=base))
        assert not (tmp_path / "m.gguf").exists()

    llama = quantized("llama", "W4A16g32sym")
    refused(quantized("qwen3", "W4A16g32sym"), base, "of architecture llama, the model of qwen3")
    other = np.zeros((96, 32), np.float16)
    wide = again(base, tmp_path / "wide", {}, {"blk.1.ffn_up.weight": other})
    refused(llama, wide, r"blk\.1\.ffn_up\.weight is \[96, 32\] there, and \[96, 64\] in the model")
    less = again(base, tmp_path / "less", {}, {}, without="blk.0.attn_v.weight")
    refused(llama, less, r"has no tensor blk\.0\.attn_v\.weight, of shape \[32, 64\]")
    more = again(base, tmp_path / "more", {}, {"blk.2.attn_v.weight": other})
    refused(llama, more, r"has a tensor blk\.2\.attn_v\.weight, of shape \[96, 32\], and the model has none")


def test_quantize_refuses_it_before_any_weight_is_read(base: Path, model: Models, tmp_path: Path) -> None:
    recipe = bitwright.Recipe(str(model("tied", vocab_size=600)), "W4A16g32", "rtn", format="gguf", base=str(base))
    with pytest.raises(RecipeError, match=r"token_embd\.weight is \[512, 64\] there, and \[600, 64\] in the model"):
        bitwright.quantize(recipe, tmp_path / "out" / "m.gguf")
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_llama_has_no_place_for(model: Models, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model("tied"), tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"model.layers.0.mlp.extra.weight": torch.zeros(2, 64)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"llama of llama\.cpp has no place for tensor .*extra\.weight \[2, 64\]"):
        gguf.check(QuantizedFolder.open(folder).config, folder, WriteOptions())


def test_what_is_no_gguf_file(model: Models, tmp_path: Path) -> None:
    config = QuantizedFolder.open(model("llama")).config
    (tmp_path / "short").write_bytes(b"GGUF\x03\x00\x00\x00")
    (tmp_path / "other").write_bytes(b"something else entirely, long enough to be read")
    for name in ("short", "other", "missing"):
        with pytest.raises(CheckpointError, match=f"{name}: cannot be read as a GGUF file"):
            gguf.check(config, model("llama"), WriteOptions(base=tmp_path / name))
