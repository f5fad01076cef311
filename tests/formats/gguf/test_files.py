"""Whole files: read with the gguf library, and loaded by transformers, which knows GGUF without us."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from tests.formats.gguf.conftest import KINDS, Models
from transformers import AutoConfig, AutoModelForCausalLM

import bitwright
from bitwright.core.errors import OutputError, RecipeError
from bitwright.core.format import WriteOptions
from bitwright.core.progress import Progress
from bitwright.formats import QuantizedFolder, gguf

Q = "model.layers.0.self_attn.q_proj"


def write(folder: Path, output: Path, **options: Any) -> GGUFReader:
    gguf.write(QuantizedFolder.open(folder), output, WriteOptions(**options))
    return GGUFReader(output)


def said(reader: GGUFReader) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


def weight(reader: GGUFReader, name: str) -> torch.Tensor:
    tensor = next(each for each in reader.tensors if each.name == name)
    return torch.from_numpy(dequantize(np.array(tensor.data), tensor.tensor_type))


def kinds(reader: GGUFReader) -> dict[str, str]:
    return {each.name: each.tensor_type.name for each in reader.tensors}


def dequantized(folder: Path) -> torch.nn.Module:
    """The model with its weights as the codes say them, all in float32."""
    found = QuantizedFolder.open(folder)
    weights = {f"{name}.weight": found.read(name).dequantize(torch.float32) for name in found.linears}
    weights |= {name: found.tensor(name).float() for name in found.passed}
    model: torch.nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(**found.config)).float().eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (set(missing) - {"lm_head.weight"}, unexpected) == (set(), [])
    return model


# transformers drops the biases of a llama file.
@pytest.mark.parametrize("name", [name for name in KINDS if name != "biased"])
def test_transformers_loads_the_file_as_the_model_that_was_quantized(
    name: str, quantized: Models, tmp_path: Path
) -> None:
    folder = quantized(name, "W4A16g32sym")
    write(folder, tmp_path / "m.gguf", embeddings="f16")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    tokens = torch.arange(3, 60)[None]
    with torch.no_grad():
        found, wanted = theirs(tokens).logits, dequantized(folder)(tokens).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_embedding_and_output_layer_in_four_bits(name: str, quantized: Models, model: Models, tmp_path: Path) -> None:
    """Rounded within the range that loses least; which tensors that befell is said."""
    folder, output = quantized(name, "W4A16g32sym"), tmp_path / "m.gguf"
    told = bitwright.export(folder, output, format="gguf", embeddings="q4_0")
    outer = {"token_embd.weight", "output.weight"} if name == "llama" else {"token_embd.weight"}
    tensors = {tensor.name: tensor for tensor in GGUFReader(output).tensors}
    assert {key for key in outer if tensors[key].tensor_type.name == "Q4_0"} == outer
    embedding = tensors["token_embd.weight"]
    found = torch.from_numpy(dequantize(embedding.data, embedding.tensor_type))
    exact = load_file(model(name) / "model.safetensors")["model.embed_tokens.weight"].float()
    assert 1e-3 < float((found - exact).square().sum() / exact.square().sum()) < 0.02
    assert "model.embed_tokens" in told.also_quantized
    assert bitwright.verify(output, model(name)).passed


def test_biases_are_in_float32_and_turned_like_their_rows(quantized: Models, model: Models, tmp_path: Path) -> None:
    reader = write(quantized("biased", "W4A16g32sym"), tmp_path / "m.gguf")
    found, exact = kinds(reader), QuantizedFolder.open(model("biased"))
    assert {name.split(".", 2)[2] for name in found if name.endswith("bias")} == {
        f"{module}.bias" for module in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    }
    for gguf_name, name, heads in (("attn_k", "k_proj", 2), ("attn_v", "v_proj", 0)):
        bias = exact.tensor(f"model.layers.1.self_attn.{name}.bias").float()
        turned = bias.view(heads, 2, 16).transpose(1, 2).reshape(-1) if heads else bias
        assert torch.equal(weight(reader, f"blk.1.{gguf_name}.bias"), turned)


def test_names_types_and_order(quantized: Models, tmp_path: Path) -> None:
    found = kinds(write(quantized("llama", "W4A16g32"), tmp_path / "m.gguf"))
    assert next(iter(found)) == "token_embd.weight" and list(found)[-2:] == ["output_norm.weight", "output.weight"]
    assert found["token_embd.weight"] == found["output.weight"] == "Q8_0"
    assert found["blk.1.ffn_down.weight"] == found["blk.0.attn_q.weight"] == "Q4_1"
    assert found["blk.0.attn_norm.weight"] == found["output_norm.weight"] == "F32"
    tied = kinds(write(quantized("tied", "W4A16g32sym"), tmp_path / "t.gguf", embeddings="f16"))
    assert "output.weight" not in tied
    assert tied["token_embd.weight"] == "F16"
    assert tied["blk.0.attn_q.weight"] == "Q4_0"


def test_rows_of_q_and_k_are_turned_within_each_head(quantized: Models, tmp_path: Path) -> None:
    folder = quantized("llama", "W4A16g32sym")
    reader = write(folder, tmp_path / "m.gguf")
    exact = QuantizedFolder.open(folder).read(Q).dequantize(torch.float32)
    found = weight(reader, "blk.0.attn_q.weight")
    for head in range(4):  # rows 0, 8, 1, 9, ... of each head of 16
        rows = [16 * head + at + half for at in range(8) for half in (0, 8)]
        assert torch.equal(found[16 * head : 16 * (head + 1)], exact[rows])
    other = write(quantized("qwen3", "W4A16g32sym"), tmp_path / "q.gguf")
    exact = QuantizedFolder.open(quantized("qwen3", "W4A16g32sym")).read(Q).dequantize(torch.float32)
    assert torch.equal(weight(other, "blk.0.attn_q.weight"), exact)


def test_an_output_layer_that_was_quantized_keeps_its_codes(quantized: Models, tmp_path: Path) -> None:
    folder = quantized("tied", "W4A16g32sym", head=True)
    reader = write(folder, tmp_path / "m.gguf")
    assert kinds(reader)["output.weight"] == "Q4_0"
    exact = QuantizedFolder.open(folder).read("lm_head").dequantize(torch.float32)
    assert torch.equal(weight(reader, "output.weight"), exact)


def test_what_the_file_says_of_itself(quantized: Models, tmp_path: Path) -> None:
    account = {
        "recipe": {"model": "/home/somebody/models/small", "calibration": "/data/text.txt"},
        "scheme": "W4A16g32",
    }
    found = said(write(quantized("llama", "W4A16g32"), tmp_path / "m.gguf", account=account))
    told = json.loads(found["bitwright.account"])
    assert told == {"recipe": {"model": "small", "calibration": "text.txt"}, "scheme": "W4A16g32"}
    assert found["general.name"] == "small"
    assert (found["general.architecture"], found["general.file_type"]) == ("llama", 3)
    assert found["general.quantization_version"] == 2
    assert [found[f"llama.{key}"] for key in ("block_count", "embedding_length", "feed_forward_length")] == [2, 64, 96]
    assert [found[f"llama.attention.head_count{key}"] for key in ("", "_kv")] == [4, 2]
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "llama-bpe")
    assert len(found["tokenizer.ggml.tokens"]) == 512
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.add_bos_token"]) == (0, True)


def test_the_same_folder_gives_the_same_bytes_and_progress_is_told(quantized: Models, tmp_path: Path) -> None:
    told: list[Progress] = []
    model = QuantizedFolder.open(quantized("llama", "W4A16g32"))
    for name in ("a", "b"):
        gguf.write(model, tmp_path / name, WriteOptions(account={"x": 1}), told.append)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    tensors = len(GGUFReader(tmp_path / "a").tensors)
    assert [each.done for each in told[: tensors + 1]] == list(range(tensors + 1))
    assert all(each.total == tensors for each in told)


def test_a_file_is_there_whole_or_not_at_all(quantized: Models, tmp_path: Path) -> None:
    output = tmp_path / "m.gguf"
    output.write_bytes(b"former")

    def stop(progress: Progress) -> None:
        if progress.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gguf.write(QuantizedFolder.open(quantized("llama", "W4A16g32")), output, WriteOptions(), stop)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    assert output.read_bytes() == b"former"
    with pytest.raises(OutputError, match=r"not there/m\.gguf: .*No such file or directory"):
        write(quantized("llama", "W4A16g32"), tmp_path / "not there" / "m.gguf")


def test_a_model_that_is_not_quantized_is_written_in_float16(model: Models, tmp_path: Path) -> None:
    reader = write(model("qwen2"), tmp_path / "m.gguf")
    assert set(kinds(reader).values()) == {"F16", "F32"}
    assert said(reader)["general.file_type"] == 1


EMBEDDING, SMALL = "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("name", "embeddings", "kind"),
    [(SMALL, None, "F16"), (EMBEDDING, "f16", "F16"), (EMBEDDING, "q8_0", "Q8_0")],
)
def test_numbers_too_small_for_float16_are_refused(
    name: str, embeddings: str | None, kind: str, model: Models, tmp_path: Path
) -> None:
    """Subnormal in float16, so that its steps are as large as they are; 100 times as large, nothing is the matter."""
    for scale in (1e-6, 1e-3):
        folder = tmp_path / f"scaled by {scale}"
        shutil.copytree(model("llama"), folder)
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = (tensors[name].float() * scale).bfloat16()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        if scale == 1e-3:
            found = bitwright.export(folder, tmp_path / "m.gguf", format="gguf", embeddings=embeddings)
            assert found.linears == 0
            continue
        with pytest.raises(RecipeError, match=rf"{name}: its numbers are too small for {kind}, .* error of .*folder"):
            bitwright.export(folder, tmp_path / "m.gguf", format="gguf", embeddings=embeddings)
        assert [each.name for each in tmp_path.iterdir()] == [folder.name]


def test_groups_along_the_output_are_refused_unless_lossy(quantized: Models, tmp_path: Path) -> None:
    folder, output = quantized("llama", "W4A16g32ic"), tmp_path / "m.gguf"
    with pytest.raises(RecipeError, match=r"layers\.0\..*tiles of 32 x 1 cannot be held exactly"):
        write(folder, output)
    assert not output.exists()
    differences = gguf.write(QuantizedFolder.open(folder), output, WriteOptions(lossy=True))
    again = [each for each in differences if not each.fresh]
    assert len(again) == 14 and {each.name for each in differences if each.fresh} == {"model.embed_tokens", "lm_head"}
    assert all(not each.codes and 0 < each.error < 0.02 for each in again)
