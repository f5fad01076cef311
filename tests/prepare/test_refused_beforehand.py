"""What can be told from config.json, scheme and shapes is refused before any work, by quantize and by export."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import Checkpoints, changed
from tests.plugin.experts import save_original

import bitwright
from bitwright.core.errors import CheckpointError, RecipeError, SchemeError
from bitwright.core.recipe import Recipe
from bitwright.core.registry import formats


@pytest.fixture(scope="module")
def of_experts(tiny: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models by name: Mixtral has its experts one by one, GptOss fused in one tensor."""
    found = {}
    for name in ("Mixtral", "GptOss"):
        found[name] = tmp_path_factory.mktemp("experts") / name
        save_original(name, found[name])
        with_tokenizer(found[name], tiny)
    return found


@pytest.fixture(scope="module")
def qwen2(tiny: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows divide into groups of 128."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("qwen2") / "model"
    config = Qwen2Config(
        vocab_size=256, hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return with_tokenizer(folder, tiny)


def with_tokenizer(folder: Path, tiny: Checkpoints) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny() / name).read_bytes())
    return folder


@pytest.mark.parametrize(("format", "says"), [
    ("gptq", r"gate_proj \[76, 64\]: 76 output features are no multiple of 32"),
    ("awq", r"gate_proj \[76, 64\]: 76 output features are no multiple of 8"),
])  # fmt: skip
def test_sizes_that_a_format_does_not_pack(format: str, says: str, tiny: Checkpoints, tmp_path: Path) -> None:
    model = str(tiny("float16", intermediate_size=76))
    with pytest.raises(RecipeError, match=f"{says}.*--exclude '") as error:
        bitwright.plan(Recipe(model, "W4A16", "rtn", format))
    advised = Recipe(model, "W4A16", "rtn", format, exclude=str(error.value).split("'")[1])
    assert bitwright.plan(advised).linears == (8 if format == "gptq" else 10)
    by_blocks = Recipe(model, "W4A16", "gptq", format, calibration="builtin", seqlen=32, samples=2)
    with pytest.raises(RecipeError, match=f"{says}.*--exclude '") as error:
        bitwright.plan(by_blocks)
    for recipe in (Recipe(model, "W4A16", "rtn", format), by_blocks):
        left = replace(recipe, exclude="*.gate_proj,*.up_proj,*.down_proj")
        assert bitwright.plan(left).linears == 8
    bitwright.quantize(Recipe(model, "W4A16", "rtn"), tmp_path / "folder")
    with pytest.raises(RecipeError, match=rf"76 (in|out)put features are no multiple of .*, as {format} packs them"):
        bitwright.export(tmp_path / "folder", tmp_path / "out", format=format)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_an_output_layer_that_does_not_fit_may_be_left_out(tiny: Checkpoints) -> None:
    recipe = Recipe(str(tiny(tied=True, vocab_size=260)), "W4A16", "rtn", "gptq", quantize_lm_head=True)
    with pytest.raises(RecipeError, match=r"lm_head \[260, 64\]: 260 output .* Or leave --quantize-lm-head out"):
        bitwright.plan(recipe)


@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_fused_experts_are_named(format: str, of_experts: dict[str, Path]) -> None:
    with pytest.raises(RecipeError, match=rf"layers\.0\.mlp\.experts\.\w+: {format} holds no .* fused over 4 experts"):
        bitwright.plan(Recipe(str(of_experts["GptOss"]), "W4A16g32", "rtn", format))


@pytest.mark.parametrize("scheme", ["W4A4", "W8A8", "W4A16KV4", "W4A4KV16"])
def test_activations_are_refused_by_every_format_of_weights_alone(scheme: str, tiny: Checkpoints) -> None:
    alone = [format.name for format in formats() if format.weights_only]
    assert {"dense", "gptq", "awq", "gguf", "mlc"} <= {*alone}
    for format in alone:
        says = f"format {format} cannot hold the activations or KV cache of scheme {scheme}"
        with pytest.raises(RecipeError, match=says):
            bitwright.plan(Recipe(str(tiny()), scheme, "rtn", format))


def test_an_export_of_activations_is_refused_before_anything_is_written(tiny: Checkpoints, tmp_path: Path) -> None:
    bitwright.quantize(Recipe(str(tiny()), "W4A8", "rtn"), tmp_path / "folder")
    with pytest.raises(RecipeError, match="format gptq cannot hold the activations or KV cache of scheme W4A8"):
        bitwright.export(tmp_path / "folder", tmp_path / "out", format="gptq")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_rows_that_are_no_whole_blocks_of_gguf(tiny: Checkpoints, tmp_path: Path) -> None:
    model = str(tiny("float16", intermediate_size=72, eos_token_id=0))
    says = r"down_proj \[64, 72\]: 72 input features are no multiple of 32, the block of GGUF"
    told = rf"{says}.*; compressed-tensors .*Or leave what does not fit as it is: --exclude"
    for scheme in ("W4A16", "W4A16g32"):  # groups that divide 72 are none of GGUF's
        with pytest.raises(RecipeError, match=told):
            bitwright.plan(Recipe(model, scheme, "rtn", "gguf"))
    bitwright.quantize(Recipe(model, "W4A16", "rtn"), tmp_path / "folder")
    with pytest.raises(RecipeError, match=says):
        bitwright.export(tmp_path / "folder", tmp_path / "out.gguf", format="gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert bitwright.export(tmp_path / "folder", tmp_path / "out.gguf", format="gguf", lossy=True).codes_kept == 12


@pytest.mark.parametrize(("format", "scheme", "divide"), [
    ("gguf", "W4A16g64", "32, 96"), ("mlc", "W4A16g64sym", "32, 96"),
    ("awq", "W4A16g64", "32, 48, 96"), (None, "W4A16g64", "32, 48, 96"),
])  # fmt: skip
def test_the_groups_that_are_offered_are_those_of_the_format(
    format: str | None, scheme: str, divide: str, tiny: Checkpoints
) -> None:
    recipe = Recipe(str(tiny(hidden_size=96, head_dim=24, eos_token_id=0)), scheme, "gptq", format)
    recipe = replace(recipe, calibration="builtin", seqlen=32, samples=2)
    with pytest.raises(SchemeError, match=rf"96 input features .* groups of 64; what divides them: {divide}[^0-9,]"):
        bitwright.plan(recipe)


def test_what_mlc_does_not_compute_goes_where_that_is_said(tiny: Checkpoints) -> None:
    """GGUF has no place for this scaling either."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    recipe = Recipe(str(tiny(rope_parameters=rope, eos_token_id=0)), "mlc:q4f16_1", "rtn", "mlc")
    says = r"'dynamic', which MLC-LLM's llama does not compute; bitwright quantize without --format and --engine writes"
    for engines in (None, "mlc"):
        with pytest.raises(RecipeError, match=says) as error:
            bitwright.plan(replace(recipe, engines=engines))
        assert "gguf" not in str(error.value)
    assert bitwright.plan(replace(recipe, format=None)).format == "bitwright"


def test_zero_points_that_mlc_has_in_llama_alone(qwen2: Path, tiny: Checkpoints, tmp_path: Path) -> None:
    says = r"q4f16_autoawq to MLC-LLM, which has only half of that for qwen2; .*--scheme mlc:q4f16_1 or W4A16g128sym"
    with pytest.raises(RecipeError, match=says):
        bitwright.plan(Recipe(str(qwen2), "W4A16g128", "rtn", "mlc"))
    assert bitwright.plan(Recipe(str(qwen2), "W4A16g128sym", "rtn", "mlc")).linears == 7
    llama = tiny(hidden_size=128, intermediate_size=128, head_dim=32)
    assert bitwright.plan(Recipe(str(llama), "W4A16g128", "rtn", "mlc")).linears == 14
    bitwright.quantize(Recipe(str(qwen2), "W4A16g128", "rtn"), tmp_path / "folder")
    with pytest.raises(RecipeError, match=says):
        bitwright.export(tmp_path / "folder", tmp_path / "out", format="mlc")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    again = bitwright.export(tmp_path / "folder", tmp_path / "out", format="mlc", lossy=True)
    assert again.codes_kept == 0 and 0 < again.largest_error < 0.02


@pytest.mark.parametrize("asked", [{"base": "model.gguf"}, {"embeddings": "f16"}])
@pytest.mark.parametrize("format", [None, "compressed-tensors", "bitwright", "gptq"])
def test_what_only_files_have_a_use_for(format: str | None, asked: dict[str, Any], tiny: Checkpoints) -> None:
    (name,) = asked
    says = (
        f"format {format} has no use for --{name}" if format else f"without a format of a file .* no use for --{name}"
    )
    with pytest.raises(RecipeError, match=says):
        bitwright.plan(Recipe(str(tiny()), "W4A16g32", "rtn", format, **asked))
    with pytest.raises(RecipeError, match="format gguf has no use for --shard-size 1GB"):
        bitwright.plan(Recipe(str(tiny()), "W4A16g32", "rtn", "gguf", shard_size="1GB"))
    both = Recipe(str(tiny(eos_token_id=0)), "W4A16g32", "rtn", embeddings="f16", engines="llama.cpp")
    assert bitwright.plan(both).format == "gguf", "the format that the engine chooses counts"


@pytest.mark.parametrize(("how", "says"), [
    ({"exclude": "*.o_proj"}, r"o_proj is not quantized in MLC-LLM's q4f16_1; the format holds"),
    ({"scheme": "mlc:q3f16_1", "embeddings": "f16"}, "--embeddings f16 goes with 4 bits .*this is q3f16_1"),
])  # fmt: skip
def test_what_mlc_has_no_preset_for(how: dict[str, Any], says: str, tiny: Checkpoints) -> None:
    with pytest.raises(RecipeError, match=says):
        bitwright.plan(Recipe(str(tiny()), **({"scheme": "mlc:q4f16_1", "format": "mlc"} | how)))


def test_tensors_that_mlc_lacks_or_needs(qwen2: Path, tmp_path: Path) -> None:
    recipe = Recipe("", "mlc:q4f16_1", "rtn", "mlc")
    bias = {"model.layers.0.self_attn.o_proj.bias": torch.zeros(128)}
    more = changed(qwen2, tmp_path / "more", lambda tensors: tensors.update(bias))
    with pytest.raises(CheckpointError, match=r"o_proj\.bias has no place in MLC-LLM's qwen2"):
        bitwright.plan(replace(recipe, model=str(more)))
    less = changed(qwen2, tmp_path / "less", lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"has no tensor .model\.norm\.weight., which its config\.json calls for"):
        bitwright.plan(replace(recipe, model=str(less)))
    broken = Path(shutil.copytree(qwen2, tmp_path / "broken"))
    (broken / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json: not JSON"):
        bitwright.plan(replace(recipe, model=str(broken)))


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors", "gguf", "mlc"])
def test_an_export_of_what_only_our_format_holds(format: str, tiny: Checkpoints, tmp_path: Path) -> None:
    """Outliers, which config.json names; no other linear is read for that."""
    model = str(tiny(eos_token_id=0))
    bitwright.quantize(Recipe(model, "W4A16g32sym", "easyquant", "bitwright"), tmp_path / "folder")
    with pytest.raises(RecipeError, match=r"tiles of 1 x 32, with \d+ outliers, cannot be held exactly.*--lossy"):
        bitwright.export(tmp_path / "folder", tmp_path / "out", format=format)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("format", ["awq", "gptq", "compressed-tensors", "gguf"])
def test_an_export_of_groups_along_the_output(format: str, tiny: Checkpoints, tmp_path: Path) -> None:
    last = "model.layers.1.self_attn.v_proj"
    recipe = Recipe(str(tiny(eos_token_id=0)), "W4A16g32", "rtn", "bitwright", scheme_for=f"{last}=W4A16g32ic")
    bitwright.quantize(recipe, tmp_path / "folder")
    begun: list[object] = []
    with pytest.raises(RecipeError, match=rf"{last}: a 4-bit .* in tiles of 32 x 1 cannot be held exactly.*--lossy"):
        bitwright.export(tmp_path / "folder", tmp_path / "out", format=format, listener=begun.append)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"] and not begun


@pytest.mark.parametrize(("format", "lossy", "scheme", "own", "says"), [
    ("awq", False, "W4A16g32", "W8A16g32", "8-bit asymmetric weight .* cannot be held exactly"),
    ("awq", False, "W4A16g32sym", "W3A16g32", "on another grid than most linears; format awq has one for all"),
    ("awq", True, "W4A16g32sym", "W8A16g32", "on another grid than most linears; format awq has one for all"),
    ("gptq", False, "W4A16g32", "W4A16g32sym", "one version for symmetric and one for asymmetric"),
    ("gptq", False, "W4A16g32", "W4A16g32real", "4-bit weight with a real-valued zero .* cannot be held exactly"),
    ("gguf", False, "W4A16g32", "W8A16g32real", "8-bit weight with a real-valued zero .* cannot be held exactly"),
    ("gguf", False, "W4A16g32", "W4A16g16", "in tiles of 1 x 16 cannot be held exactly"),
    ("mlc", False, "W4A16g32sym", "W8A16g32sym", "8-bit symmetric weight .* cannot be held exactly in MLC-LLM"),
    ("mlc", False, "W4A16g32sym", "W4A16g16sym", "in tiles of 1 x 16 cannot be held exactly"),
])  # fmt: skip
def test_an_export_of_linears_that_do_not_go_together(
    format: str, lossy: bool, scheme: str, own: str, says: str, tiny: Checkpoints, tmp_path: Path
) -> None:
    """Headers and config.json tell, so nothing is begun; the odd linear is the last."""
    last = "model.layers.1.mlp.down_proj"
    recipe = Recipe(str(tiny(eos_token_id=0)), scheme, "rtn", "bitwright", scheme_for=f"{last}={own}")
    bitwright.quantize(recipe, tmp_path / "folder")
    begun: list[object] = []
    with pytest.raises(RecipeError, match=f"{last}: .*{says}"):
        bitwright.export(tmp_path / "folder", tmp_path / "out", format=format, lossy=lossy, listener=begun.append)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"] and not begun


def test_an_export_of_linears_on_two_grids(tiny: Checkpoints, tmp_path: Path) -> None:
    bitwright.quantize(Recipe(str(tiny(num_key_value_heads=4)), "W4A16g32sym", "rtn", "gptq"), tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    config["quantization_config"]["dynamic"] = {r"+:.*1\.self_attn\.v_proj": {"sym": False}}
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match=r"layers\.1\.self_attn\.v_proj: on another grid than most linears"):
        bitwright.export(tmp_path / "folder", tmp_path / "out", format="awq", lossy=True)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    exported = bitwright.export(tmp_path / "folder", tmp_path / "out", format="compressed-tensors")
    assert exported.exact == exported.linears == 14
