"""MLC-LLM's folders: the page's worked example, every path into them, and a reader that knows the page alone."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import Checkpoints
from tests.formats.test_bitwright import some
from tests.golden import mlc_page
from transformers import AutoConfig, AutoModelForCausalLM

import bitwright
from bitwright import Recipe
from bitwright.core.decisions import LinearDecision
from bitwright.core.decoder import decoder_of
from bitwright.core.errors import CheckpointError, UserError
from bitwright.core.format import WriteOptions
from bitwright.core.grid import FULL, Grid, Tile
from bitwright.core.qtensor import QTensor
from bitwright.core.scheme import NAMED, Scheme
from bitwright.formats import QuantizedFolder, mlc
from bitwright.formats.mlc import architectures, chat, shards
from bitwright.formats.mlc.beforehand import preset_of
from bitwright.formats.mlc.presets import PRESETS, fitted_to, packed, placed
from bitwright.formats.mlc.shards import Shards
from bitwright.steps.apply import quantize_linear

PRESET = {preset.name: preset for preset in PRESETS}
HEX3 = ["08FAC688", "1A23EB1A", "2C688FAC", "3EB1A23E"]
TOKENS = torch.arange(0, 250, 7)[None]


def quantized(source: Path, out: Path, scheme: str, **also: Any) -> Path:
    bitwright.quantize(Recipe(str(source), scheme, "rtn", **also), out)
    return out


def words(weight: QTensor, preset: str) -> list[str]:
    return [f"{word & 0xFFFFFFFF:08X}" for word in packed(weight, PRESET[preset])[0].tolist()]


def test_the_worked_example_of_the_page() -> None:
    three, four = PRESET["q3f16_1"], PRESET["q4f16_1"]
    codes = torch.arange(40, dtype=torch.int8)[None]
    q = QTensor(codes % 8 - 3, torch.full((1, 1), 0.5).half(), None, three.scheme.weight, three.scheme.tile)
    assert words(q, "q3f16_1") == HEX3
    assert q.dequantize()[0, :8].tolist() == [-1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2]
    q = QTensor(codes % 16 - 7, torch.ones(1, 2).half(), None, four.scheme.weight, four.scheme.tile)
    assert words(q, "q4f16_1") == [*["76543210", "FEDCBA98"] * 2, "76543210", *["00000000"] * 3]
    stored: dict[str, mlc_page.Array] = {
        "x.q_weight": np.array([[int(word, 16) for word in HEX3]], np.uint32),
        "x.q_scale": np.array([[0.5]], np.float16),
    }
    assert mlc_page.weight(stored, "x", "q3f16_1", 40)[0, :8].tolist() == [-1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2]


@pytest.mark.parametrize("name", PRESET)
@pytest.mark.parametrize("columns", [320, 130, 24])
def test_packed_and_read_from_the_page(name: str, columns: int, tmp_path: Path) -> None:
    preset = PRESET[name]
    q = some((5, columns), preset.scheme.weight, preset.scheme.tile, torch.float16)
    writer = Shards(tmp_path)
    writer.add("x.q_weight", packed(q, preset))
    writer.add("x.q_scale", q.scale)
    writer.finish(q.codes.numel())
    stored = mlc_page.tensors(tmp_path)
    np.testing.assert_array_equal(mlc_page.weight(stored, "x", name, columns), q.dequantize().numpy())
    assert sum(t.nbytes for t in stored.values()) == mlc.stored_bytes((5, columns), preset.scheme, torch.float16)


HELD = [
    ("W4A16g32sym", "q4f16_1"), ("W4A16g64sym", "q4f16_1"), ("W4A16sym", "q4f16_1"), ("W3A16g32", "q4f16_1"),
    ("W3A16g40sym", "q3f16_1"), ("W3A16g64sym", "q4f16_1"), ("W2A16g80", "q3f16_1"), ("W2A16g64", "q4f16_1"),
    ("W2A16g64sym", "q2f16_1"), ("W2A16sym", "q2f16_1"), ("mlc:q4f16_1", "q4f16_1"), ("mlc:q3f16_1", "q3f16_1"),
]  # fmt: skip


@pytest.mark.parametrize(("scheme", "preset"), HELD)
def test_what_a_preset_holds_it_holds_exactly(scheme: str, preset: str) -> None:
    asked, columns = Scheme.parse(scheme), 320
    assert mlc.holds(asked.weight, asked.tile, False)
    assert preset_of(asked.weight, asked.tile).name == preset
    q = some((6, columns), asked.weight, asked.tile, torch.float16)
    extreme = QTensor(q.codes.clone(), q.scale, q.zero, q.grid, q.tile)
    extreme.codes[::2, ::3], extreme.codes[1::2, ::3] = q.grid.qmin, q.grid.qmax
    extreme.codes[3, :40] = q.grid.qmin
    for one in (q, extreme):
        made = placed(one, PRESET[preset])
        assert made is not None
        assert torch.equal(made.dequantize(torch.float32), one.dequantize(torch.float32))


def test_a_group_with_minus_eight_is_turned_round() -> None:
    codes = torch.tensor([[-8, 7] + [0] * 30 + [-7, 7] + [0] * 30], dtype=torch.int8)
    q = QTensor(codes, torch.tensor([[0.5]]), None, Grid.integers(4, symmetric=True), Tile(1, FULL))
    made = placed(q, PRESET["q4f16_1"])
    assert made is not None and made.scale.tolist() == [[-0.5, 0.5]]
    assert made.codes[0, :2].tolist() == [8, -7] and made.codes[0, 32:34].tolist() == [-7, 7]


@pytest.mark.parametrize(("scheme", "says"), [
    ("W4A16g32", "4-bit asymmetric weights in these groups"), ("W8A16", "8-bit asymmetric weights in these groups"),
    ("W4A16g40sym", "4-bit symmetric weights in these groups"), ("W4A16g128icsym", "groups along the output"),
    ("W4A16g16sym", "4-bit symmetric weights in these groups"),
    ("W5A16g32sym", "5-bit symmetric weights in these groups"),
])  # fmt: skip
def test_what_no_preset_holds(scheme: str, says: str, tiny: Checkpoints) -> None:
    asked = Scheme.parse(scheme)
    assert not mlc.holds(asked.weight, asked.tile, False)
    with pytest.raises(UserError, match=f"format mlc cannot hold {says}, which scheme {scheme}"):
        bitwright.plan(Recipe(str(tiny()), scheme, "rtn", format="mlc"))


def test_outliers_are_refused(tiny: Checkpoints) -> None:
    assert not mlc.holds(*(NAMED["mlc:q4f16_1"].weight, NAMED["mlc:q4f16_1"].tile), True)
    with pytest.raises(UserError, match="format mlc cannot hold outliers"):
        bitwright.plan(Recipe(str(tiny()), "mlc:q4f16_1", "easyquant", format="mlc"))


def dense(folder: Path, original: Path) -> Any:
    """The model in a folder, read by the page's reader and computed by transformers in float32."""
    said = json.loads((folder / "mlc-chat-config.json").read_text())
    stored, preset, config = mlc_page.tensors(folder), said["quantization"], AutoConfig.from_pretrained(original)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.data = torch.from_numpy(_one(stored, name, preset, parameter.shape, config).astype(np.float32))
    return model.eval()


def _one(stored: Any, name: str, preset: str, shape: Any, config: Any) -> Any:
    if name in stored:
        return stored[name]
    joined, start = name, 0
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    q, kv = (n * width for n in (config.num_attention_heads, config.num_key_value_heads))
    qkv = "c_attn" if config.model_type.startswith("qwen") else "qkv_proj"
    for part, first, other in (
        ("q_proj", 0, qkv),
        ("k_proj", q, qkv),
        ("v_proj", q + kv, qkv),
        ("gate_proj", 0, "gate_up_proj"),
        ("up_proj", config.intermediate_size, "gate_up_proj"),
    ):
        if f".{part}." in name:
            joined, start = name.replace(part, other), first  # fmt: skip
    rows = slice(start, start + shape[0])
    if name.endswith("bias"):
        return stored[joined][rows]
    return mlc_page.weight(stored, joined.removesuffix(".weight"), preset, shape[1])[rows]


@pytest.mark.parametrize("scheme", [*NAMED, "W4A16g32sym", "W3A16g64", "W2A16sym"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_computes_what_was_quantized(scheme: str, tied: bool, tiny: Checkpoints, tmp_path: Path) -> None:
    """All but embedding and output layer; where transformers loads compressed-tensors, products are rounded later."""
    source = tiny("float16", tied=tied)
    folder = quantized(source, tmp_path / "folder", scheme)
    exported = bitwright.export(folder, tmp_path / "mlc", format="mlc")
    bitwright.quantize(Recipe(str(source), scheme, "rtn", format="mlc"), tmp_path / "at once")
    assert exported.exact == 14 and exported.linears == 14 and len(exported.also_quantized) == (1 if tied else 2)
    ours, theirs = bitwright.load(folder), dense(tmp_path / "mlc", source)
    for name, parameter in theirs.named_parameters():
        held = ours.get_submodule(name.removesuffix(".weight")).weight
        assert isinstance(held, torch.Tensor)
        want = held.detach().float()
        lost = float((want - parameter.detach()).square().sum() / want.square().sum())
        assert lost <= (0.2 if "embed" in name or "head" in name else 0 if scheme in NAMED else 1e-7), name
    for path in (tmp_path / "mlc").iterdir():
        if not path.name.startswith("bitwright"):
            assert path.read_bytes() == (tmp_path / "at once" / path.name).read_bytes(), path.name
    said = json.loads((tmp_path / "mlc" / "mlc-chat-config.json").read_text())
    assert said["model_config"]["tie_word_embeddings"] is tied
    assert ("lm_head.q_weight" in mlc_page.tensors(tmp_path / "mlc")) is not tied


def test_embeddings_in_float16_are_a_preset_of_their_own(tiny: Checkpoints, tmp_path: Path) -> None:
    folder = quantized(tiny(), tmp_path / "folder", "mlc:q4f16_1")
    exported = bitwright.export(folder, tmp_path / "mlc", format="mlc", embeddings="f16")
    said = json.loads((tmp_path / "mlc" / "mlc-chat-config.json").read_text())
    stored = mlc_page.tensors(tmp_path / "mlc")
    assert (said["quantization"], exported.exact, exported.linears) == ("q4f16_2", 14, 14)
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= {*stored}
    three = quantized(tiny(), tmp_path / "three", "mlc:q3f16_1")
    with pytest.raises(UserError, match="goes with 4 bits"):
        bitwright.export(three, tmp_path / "mlc3", format="mlc", embeddings="f16")
    with pytest.raises(UserError, match="no embeddings in q8_0"):
        bitwright.export(folder, tmp_path / "mlc4", format="mlc", embeddings="q8_0")


def test_zero_points_take_the_path_of_autoawq(tiny: Checkpoints, tmp_path: Path) -> None:
    source = tiny("float16", hidden_size=128, intermediate_size=256, head_dim=32)
    folder = quantized(source, tmp_path / "folder", "W4A16g128")
    exported = bitwright.export(folder, tmp_path / "mlc", format="mlc")
    said = json.loads((tmp_path / "mlc" / "mlc-chat-config.json").read_text())
    assert (said["quantization"], exported.exact, exported.linears) == ("q4f16_autoawq", 14, 14)
    with torch.inference_mode():
        ours, theirs = (model(TOKENS).logits for model in (bitwright.load(folder), dense(tmp_path / "mlc", source)))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02)
    q = QuantizedFolder.open(folder).read("model.layers.0.mlp.down_proj")
    found = mlc_page.awq(mlc_page.tensors(tmp_path / "mlc"), "model.layers.0.mlp.down_proj")
    np.testing.assert_array_equal(found, q.dequantize(torch.float16).numpy())


HEADS = [
    ("W4A16g128", None, "q4f16_autoawq"), ("W4A16g128sym", "f16", "q4f16_2"), ("W4A16g128sym", None, "q4f16_1"),
    ("mlc:q3f16_1", None, "q3f16_1"), ("W2A16sym", None, "q2f16_1"),
]  # fmt: skip


@pytest.mark.parametrize(("scheme", "embeddings", "preset"), HEADS)
def test_a_quantized_output_layer(
    scheme: str, embeddings: str | None, preset: str, tiny: Checkpoints, tmp_path: Path
) -> None:
    """Presets without codes for it have it in float16, read back and its error told; the others keep its codes."""
    source = tiny("float16", hidden_size=128, intermediate_size=256, head_dim=32)
    at_once = Recipe(str(source), scheme, "rtn", format="mlc", embeddings=embeddings, quantize_lm_head=True)
    result = bitwright.quantize(at_once, tmp_path / "at once")
    said = json.loads((tmp_path / "at once" / "mlc-chat-config.json").read_text())
    kept = preset in PRESET
    assert said["quantization"] == preset
    assert any("has no place for the codes of lm_head: relative error" in note for note in result.notes) is not kept
    folder = quantized(source, tmp_path / "folder", scheme, quantize_lm_head=True)
    exported = bitwright.export(folder, tmp_path / "mlc", format="mlc", embeddings=embeddings)
    assert (exported.linears, exported.codes_kept) == (15, 15 if kept else 14)
    if not kept:
        head = QuantizedFolder.open(folder).read("lm_head").dequantize(torch.float32)
        stored = mlc_page.tensors(tmp_path / "mlc")["lm_head.weight"].astype(np.float32)
        error = float((head - torch.from_numpy(stored)).square().sum() / head.square().sum())
        assert exported.largest_in == "lm_head" and exported.largest_error == pytest.approx(error, rel=1e-3)
        assert 0 < error < 1e-6
    for place in ("mlc", "at once"):
        assert bitwright.verify(tmp_path / place, folder).passed


def test_weights_that_fit_nowhere_take_lossy(tiny: Checkpoints, tmp_path: Path) -> None:
    folder = quantized(tiny("float16"), tmp_path / "folder", "W4A16g32")
    with pytest.raises(UserError, match=r"cannot be held exactly in MLC-LLM's q4f16_1.* --lossy"):
        bitwright.export(folder, tmp_path / "mlc", format="mlc")
    assert not (tmp_path / "mlc").exists()
    exported = bitwright.export(folder, tmp_path / "mlc", format="mlc", lossy=True)
    assert exported.codes_kept == 0 and 0 < exported.mean_error < 0.02


ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral, window": ("MistralConfig", {"sliding_window": 64}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "qwen3, biases": ("Qwen3Config", {"head_dim": 16, "attention_bias": True}),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures(name: str, tiny: Checkpoints, tmp_path: Path) -> None:
    import transformers

    kind, settings = ARCHITECTURES[name]
    config = getattr(transformers, kind)(
        vocab_size=256, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    for parameter in model.parameters():  # biases would be zeros
        parameter.data += 0.01 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "model")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / file).write_bytes((tiny() / file).read_bytes())
    folder = quantized(tmp_path / "model", tmp_path / "folder", "mlc:q4f16_1", exclude="lm_head")
    exported = bitwright.export(folder, tmp_path / "mlc", format="mlc")
    assert (exported.exact, exported.linears, len(exported.also_quantized)) == (14, 14, 2)
    ours, theirs = bitwright.load(folder), dense(tmp_path / "mlc", tmp_path / "model")
    ours.model.embed_tokens.weight.data = theirs.model.embed_tokens.weight.data
    with torch.inference_mode():
        assert torch.equal(ours.model(TOKENS).last_hidden_state, theirs.model(TOKENS).last_hidden_state)
    said = json.loads((tmp_path / "mlc" / "mlc-chat-config.json").read_text())
    assert said["sliding_window_size"] == (64 if name.endswith("window") else -1)
    assert said["context_window_size"] == (-1 if name.endswith("window") else 128)


def config_of(**changes: Any) -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4,
        "num_hidden_layers": 2, "rms_norm_eps": 1e-6, "vocab_size": 256, "max_position_embeddings": 20000,
    } | changes  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "gemma3"}, "written for llama, mistral, qwen2, qwen3, and this is 'gemma3'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rotary scaling is 'yarn', which MLC-LLM's llama does not compute"),
        ({"model_type": "mistral", "rope_parameters": {"rope_type": "llama3"}}, "rotary scaling is 'llama3'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias or mlp_bias is True"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window is True"),
        ({"vocab_size": None}, "does not say vocab_size"),
    ],
)
def test_models_that_mlc_cannot_run_are_refused_before_the_work(
    changes: dict[str, Any], says: str, tiny: Checkpoints
) -> None:
    with pytest.raises(UserError, match=says):
        mlc.check(config_of(**changes), tiny(), WriteOptions())


def test_settings_are_taken_wherever_they_stand() -> None:
    scaled = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 500000.0}
    for config in (config_of(rope_parameters=scaled), config_of(rope_scaling=scaled, rope_theta=500000.0)):
        found = architectures.model_config(decoder_of(config))
        assert found["position_embedding_base"] == 500000.0
        assert found["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}
        assert (found["context_window_size"], found["prefill_chunk_size"], found["head_dim"]) == (20000, 8192, 16)


@pytest.mark.parametrize(
    ("template", "name", "stops"),
    [
        (None, "LM", [7]),
        ("{% if x %}<|im_start|>user", "chatml", [7, 9]),
        ("<|start_header_id|>user", "llama-3", [7, 8]),
        ("[INST] x [/INST]", "mistral_default", [7]),
    ],
)
def test_the_conversation_is_that_of_the_chat_template(
    template: str | None, name: str, stops: list[int], tmp_path: Path
) -> None:
    added = [{"content": "<|eot_id|>", "id": 8}, {"content": "<|im_end|>", "id": 9}]
    tokenizer = {"model": {"vocab": {"a": 0}}, "added_tokens": added, "decoder": {"type": "ByteLevel"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "add_bos_token": True}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    config = config_of(eos_token_id=7, bos_token_id=1)
    decoder = decoder_of(config)
    found = chat.chat_config(config, decoder, tmp_path, "q4f16_1", None)
    conversation = found["conv_template"]
    assert (conversation["name"], conversation["stop_token_ids"]) == (name, stops)
    assert conversation["system_prefix_token_ids"] == [1]
    assert (found["temperature"], found["top_p"], found["active_vocab_size"]) == (0.6, 1.0, 3)
    assert found["tokenizer_info"]["token_postproc_method"] == "byte_level"
    own = found | {"conv_template": {"name": "mine"}, "top_p": 0.9}
    (tmp_path / "mlc-chat-config.json").write_text(json.dumps(own))
    again = chat.chat_config(config, decoder, tmp_path, "q4f16_1", tmp_path)
    assert (again["conv_template"], again["top_p"], again["quantization"]) == ({"name": "mine"}, 0.9, "q4f16_1")
    with pytest.raises(UserError, match=r"is the mlc-chat-config.json of a llama model; name .* of a mistral model"):
        chat.of_base(tmp_path / "mlc-chat-config.json", "mistral")
    (tmp_path / "m.gguf").write_bytes(b"GGUF\xbd\xff")
    (tmp_path / "list.json").write_text("[1]")
    for name, says in (("m.gguf", "is no"), ("list.json", "is no"), ("gone", "no such file"), ("x", "has no")):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=rf"--base .*{name}: .*{says}.*; name the mlc-chat-config.json of a llama"):
            chat.of_base(tmp_path / name, "llama")


def test_a_sentencepiece_tokenizer(tmp_path: Path) -> None:
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    tokenizer = {
        "model": {"vocab": {"a": 0}},
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}]},
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, strip]},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert chat.chat_config(config_of(), decoder_of(config_of()), tmp_path, "q4f16_1", None)["tokenizer_info"] == {
        "token_postproc_method": "byte_fallback", "prepend_space_in_encode": True, "strip_space_in_decode": True,
    }  # fmt: skip


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither tokenizer.json nor tokenizer.model"):
        mlc.check(config_of(), tmp_path, WriteOptions())


def test_a_model_that_is_not_quantized_is_refused(tiny: Checkpoints, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not quantized"):
        mlc.FORMAT.write(QuantizedFolder.open(tiny()), tmp_path, WriteOptions(), lambda _: None)


def test_shards_are_full_and_a_large_tensor_is_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 64)
    writer = Shards(tmp_path)
    for n, size in enumerate((8, 16, 8, 100, 4, 28)):
        writer.add(f"t{n}", torch.full((size,), float(n), dtype=torch.float16))
    writer.finish(164)
    index = json.loads((tmp_path / "tensor-cache.json").read_text())
    assert [[one["name"] for one in shard["records"]] for shard in index["records"]] == [
        ["t0", "t1", "t2"], ["t3"], ["t4", "t5"],
    ]  # fmt: skip
    assert index["metadata"] == {"ParamSize": 6, "ParamBytes": 328, "BitsPerParam": 16.0}
    assert {name: t.tolist() for name, t in mlc_page.tensors(tmp_path).items()}["t5"] == [5.0] * 28


def test_fitted_weights_lose_less_than_their_range_would() -> None:
    weight = torch.randn(40, 100, generator=torch.Generator().manual_seed(0)) ** 3
    for preset in PRESETS:
        made = fitted_to(weight, preset)
        plain = some((40, 100), preset.scheme.weight, preset.scheme.tile, torch.float16)
        assert made.tile == plain.tile and made.scale.dtype == torch.float16
        by_range = quantize_linear(weight, LinearDecision(), preset.scheme, torch.float16)
        lost = [float((one.dequantize(torch.float32) - weight).square().sum()) for one in (made, by_range)]
        assert lost[0] < lost[1]


def test_tvm_reads_what_is_written(tiny: Checkpoints, tmp_path: Path) -> None:
    """TVM's own loader, where a Python that has apache-tvm is named in TVM_PYTHON."""
    python = os.environ.get("TVM_PYTHON")
    if python is None:
        pytest.skip("TVM_PYTHON names no Python with apache-tvm==0.26.0")
    folder = quantized(tiny("float16"), tmp_path / "mlc", "mlc:q3f16_1", format="mlc")
    script = """
import sys, numpy, tvm
tvm.get_global_func("vm.builtin.tensor_cache.load")(sys.argv[1], tvm.cpu().dlpack_device_type(), 0)
get = tvm.get_global_func("vm.builtin.tensor_cache.get")
numpy.savez(sys.argv[2], **{name: get(name).numpy() for name in sys.argv[3:]})
"""
    stored = mlc_page.tensors(folder)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([python, "-c", script, str(folder), str(tmp_path / "x.npz"), *stored], check=True, env=environment)
    for name, found in np.load(tmp_path / "x.npz").items():
        assert found.dtype == stored[name].dtype
        np.testing.assert_array_equal(found, stored[name])
    assert sys.executable != python


@pytest.mark.parametrize(("scheme", "small", "says"), [
    ("W4A16g32sym", "model.layers.1.mlp.up_proj.weight", r"model\.layers\.1\.mlp\.gate_up_proj: scales too small"),
    ("mlc:q4f16_1", "model.layers.0.input_layernorm.weight", r"model\.layers\.0\.input_layernorm\.weight too small"),
])  # fmt: skip
def test_numbers_too_small_for_float16_are_refused(
    scheme: str, small: str, says: str, tiny: Checkpoints, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny("bfloat16"), tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors[small] *= 2**-40
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    folder = quantized(model, tmp_path / "folder", scheme)
    with pytest.raises(CheckpointError, match=says):
        bitwright.export(folder, tmp_path / "mlc", format="mlc")
    assert not (tmp_path / "mlc").exists()


def test_an_output_layer_that_was_untied_is_no_other_setting(tiny: Checkpoints, tmp_path: Path) -> None:
    source = tiny("float16", tied=True)
    out = quantized(source, tmp_path / "out", "mlc:q4f16_1", format="mlc", quantize_lm_head=True)
    assert not json.loads((out / chat.CONFIG).read_text())["model_config"]["tie_word_embeddings"]
    result = bitwright.verify(out, source)
    assert result.passed, result.checks
    shuffled = Path(shutil.copytree(source, tmp_path / "other"))
    tensors = load_file(shuffled / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].roll(1, 0)
    save_file(tensors, shuffled / "model.safetensors", metadata={"format": "pt"})
    assert not bitwright.verify(out, shuffled, logits=False).passed
