"""--base: metadata of an existing file with other weights, and files of other models refused."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from safetensors.torch import load_file, save_file
from tests.formats.gguf.conftest import Models

import bitwright
from bitwright.core.errors import CheckpointError, RecipeError
from bitwright.core.format import WriteOptions
from bitwright.core.recipe import Recipe
from bitwright.formats import QuantizedFolder, gguf
from bitwright.formats.gguf.reading import opened


@pytest.fixture
def base(model: Models, tmp_path: Path) -> Path:
    """The model in 16 bits with a line of its own, a rotary tensor, and an account that is not of the new file."""
    plain, path = tmp_path / "plain.gguf", tmp_path / "base.gguf"
    gguf.write(QuantizedFolder.open(model("llama")), plain, WriteOptions(account={"of": "another"}))
    return again(plain, path, {"general.author": "somebody"}, {"rope_freqs.weight": np.ones(8, np.float32)})


def again(
    source: Path,
    target: Path,
    texts: dict[str, str],
    tensors: dict[str, np.ndarray],
    without: str = "-",
    **says: float | list[str] | None,
) -> Path:
    """A copy of a file by the library alone, with more in it, and keys that say something else; None: nothing."""
    other = {key.replace("__", "."): value for key, value in says.items()}
    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF", "general.architecture")):
            of = field.types[-1] if field.types[0] is GGUFValueType.ARRAY else None
            if (value := other.get(name, field.contents())) is not None:
                writer.add_key_value(name, value, field.types[0], of)
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
    assert np.array_equal(weights.pop("rope_freqs.weight"), np.ones(8))
    assert weights.keys() == {each.name for each in own.tensors}
    assert all(np.array_equal(weights[each.name], each.data) for each in own.tensors)


def test_with_a_base_the_folders_tokenizer_is_not_looked_at(base: Path, model: Models, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model("llama"), tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*")))
    config = QuantizedFolder.open(folder).config
    with pytest.raises(RecipeError, match=r"neither tokenizer\.json nor tokenizer\.model"):
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


ROPE, ATTENTION = "llama__rope__", "llama__attention__"
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(("says", "wrong"), [
    ({f"{ROPE}freq_base": 500000.0}, r"llama\.rope\.freq_base is 500000, the folder's 10000"),
    ({f"{ATTENTION}head_count_kv": 4}, r"llama\.attention\.head_count_kv is 4, the folder's 2"),
    ({f"{ATTENTION}head_count_kv": None}, r"llama\.attention\.head_count_kv is 4, the folder's 2"),
    ({f"{ATTENTION}layer_norm_rms_epsilon": 1e-5}, r"rms_epsilon is 1e-05, the folder's 1e-06"),
    ({"tokenizer__ggml__tokens": ["a", "b"]}, r"its tokenizer has 2 tokens .*the model 512 \(vocab_size\)"),
    ({"tokenizer__ggml__tokens": None}, r"its tokenizer has 0 tokens .*the model 512 \(vocab_size\)"),
    ({f"{ROPE}freq_base": None, "llama__context_length": 4096, "llama__vocab_size": None}, ""),
])  # fmt: skip
def test_settings_of_another_model_with_the_same_shapes(
    says: dict[str, Any], wrong: str, base: Path, model: Models, tmp_path: Path
) -> None:
    other, recipe = again(base, tmp_path / "other.gguf", {}, {}, **says), Recipe(str(model("llama")), "W4A16g32", "rtn")
    recipe = replace(recipe, format="gguf", base=str(other))
    if not wrong:
        assert bitwright.plan(recipe).format == "gguf", "llama.cpp takes 10000 too, and any context"
        return
    with pytest.raises(RecipeError, match=rf"--base \S*other\.gguf: .*{wrong}; it is the file of another model"):
        bitwright.quantize(recipe, tmp_path / "out" / "m.gguf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rope", [
    LLAMA3, {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
], ids=lambda rope: rope["rope_type"])  # fmt: skip
def test_rotary_scaling_of_another_model(rope: dict[str, Any], model: Models, tmp_path: Path) -> None:
    """Llama 3 and 3.1 have the same shapes: one scales its rotary embeddings, the other does not."""
    plain, scaled = model("llama"), model("llama", rope_parameters=rope, max_position_embeddings=512)
    for name, folder in (("plain", plain), ("scaled", scaled)):
        gguf.write(QuantizedFolder.open(folder), tmp_path / f"{name}.gguf", WriteOptions())
        assert opened(tmp_path / f"{name}.gguf").unlike(QuantizedFolder.open(folder).config) == []
    found = QuantizedFolder.open(plain)
    with pytest.raises(RecipeError, match=r"rope(_freqs|\.scaling).* is .*, the folder's (1|none)"):
        gguf.check(found.config, plain, WriteOptions(base=tmp_path / "scaled.gguf"))
    gguf.check(found.config, plain, WriteOptions(base=tmp_path / "plain.gguf"))
    (said,) = opened(tmp_path / "plain.gguf").unlike(QuantizedFolder.open(scaled).config)[:1]
    if rope is LLAMA3:  # no base is needed for them
        assert said == "rope_freqs.weight is not there, the folder's rotary embeddings are scaled as llama3"
        gguf.check(QuantizedFolder.open(scaled).config, scaled, WriteOptions(base=tmp_path / "plain.gguf"))
    else:
        assert said == f"llama.rope.scaling.type is none, the folder's {rope['rope_type']}"


def test_a_scaling_by_1_is_none(base: Path, model: Models, tmp_path: Path) -> None:
    config = QuantizedFolder.open(model("llama")).config
    other = again(base, tmp_path / "other", {"llama.rope.scaling.type": "linear"}, {})
    gguf.check(config, model("llama"), WriteOptions(base=other))


def test_a_model_without_a_tokenizer(base: Path, model: Models, tmp_path: Path) -> None:
    """That of the base is what the file has; where text is read, or a folder is written, there has to be one."""
    folder = Path(shutil.copytree(model("llama"), tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*")))
    recipe = Recipe(str(folder), "W4A16g32", "rtn", format="gguf", base=str(base))
    bitwright.quantize(recipe, tmp_path / "based.gguf")
    bitwright.quantize(replace(recipe, model=str(model("llama"))), tmp_path / "with.gguf")
    ours, theirs = (GGUFReader(tmp_path / name) for name in ("based.gguf", "with.gguf"))
    assert [np.array(each.data).tobytes() for each in ours.tensors] == [
        np.array(each.data).tobytes() for each in theirs.tensors
    ]
    assert ours.fields["tokenizer.ggml.tokens"].contents() == theirs.fields["tokenizer.ggml.tokens"].contents()
    assert bitwright.verify(tmp_path / "based.gguf", folder).passed
    assert bitwright.plan(replace(recipe, format=None, engines="llama.cpp")).format == "gguf"
    for how in ({"base": None}, {"calibration": "builtin"}, {"base": None, "format": None}):
        with pytest.raises(CheckpointError, match="has no tokenizer"):
            bitwright.plan(replace(recipe, **how))


def test_what_is_no_gguf_file(base: Path, model: Models, tmp_path: Path) -> None:
    config = QuantizedFolder.open(model("llama")).config
    (tmp_path / "short").write_bytes(base.read_bytes()[:5000])
    (tmp_path / "half").write_bytes(base.read_bytes()[:-5000])
    (tmp_path / "other").write_bytes(b"something else entirely, long enough to be read")
    for name, says in (
        ("short", "is cut short, or damaged: it ends at byte 5,000, within .*; download it again"),
        ("half", "is cut short: .* ends at byte .*; download it again"),
        ("other", "is no GGUF file: it begins with b'some', .*; name another, or download it again"),
        ("missing", "there is no such file; name the GGUF file of this model, or leave --base out"),
        (".", "is a folder; name the GGUF file of this model, or leave --base out"),
    ):
        path = tmp_path / name
        with pytest.raises(CheckpointError, match=rf"^--base {path}: {says}$"):
            gguf.check(config, model("llama"), WriteOptions(base=path))
