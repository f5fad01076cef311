"""A scheme per linear: from flags, recipes and files, through every method and into every format that can mix."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import Checkpoints, contents

import bitwright
from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.errors import RecipeError, SchemeError
from bitwright.core.recipe import Recipe
from bitwright.evaluation.loading import load_codes
from bitwright.formats import QuantizedFolder

DOWN, Q = "mlp.down_proj", "self_attn.q_proj"
BLOCKS = ("model.layers.0", "model.layers.1")
MIXED: dict[str, Any] = {"scheme_for": [f"*.{DOWN}=W8A16g32", f"*.0.{Q}=W3A16g16"], "exclude": "*.1.self_attn.o_proj"}


def own_scheme(linear: str) -> str | None:
    """The scheme of a linear under ``MIXED`` and the default W4A16g32."""
    if linear.endswith(DOWN):
        return "W8A16g32"
    if linear == f"{BLOCKS[0]}.{Q}":
        return "W3A16g16"
    return None if linear == f"{BLOCKS[1]}.self_attn.o_proj" else "W4A16g32"


@pytest.mark.parametrize("method", [
    "rtn", "gptq", "awq", "adadim", "lwc", "lsq", "pact", "easyquant", "smoothquant", "osplus", "let+lwc", "equalize",
    "adadim+gptq", "awq+gptq", "equalize+easyquant+gptq",
])  # fmt: skip
def test_every_method_quantizes_each_linear_to_its_own_scheme(method: str, tiny: Checkpoints, tmp_path: Path) -> None:
    text: dict[str, Any] = (
        {} if method in ("rtn", "easyquant") else {"calibration": "builtin", "samples": 2, "seqlen": 32}
    )
    learns: dict[str, Any] = {"epochs": 1} if {"lwc", "lsq", "pact"} & {*method.split("+")} else {}
    recipe = Recipe(str(tiny(num_key_value_heads=4)), "W4A16g32", method, "bitwright", **MIXED, **text, **learns)
    bitwright.quantize(recipe, tmp_path / "out")
    model, original = QuantizedFolder.open(tmp_path / "out"), Checkpoint.open(tiny(num_key_value_heads=4))
    assert len(model.linears) == 13
    for linear in model.linears:
        scheme, quantized = own_scheme(linear), model.read(linear)
        assert scheme is not None and quantized.grid.bits == int(scheme[1])
        assert max(quantized.tile.size(quantized.shape)) == int(scheme.split("g")[1])
        weight = original.read(f"{linear}.weight").float()
        if method in ("rtn", "easyquant"):  # others look at the output, or move scales between linears
            error = float((quantized.dequantize(torch.float32) - weight).norm() / weight.norm())
            assert error < {3: 0.5, 4: 0.2, 8: 0.02}[quantized.grid.bits]
    left = "model.layers.1.self_attn.o_proj.weight"
    assert left in model.passed
    if method in ("rtn", "gptq", "easyquant"):
        assert torch.equal(model.tensor(left), original.read(left))


def test_a_linear_in_full_precision_keeps_its_dtype_when_a_transform_moves_it(
    tiny: Checkpoints, tmp_path: Path
) -> None:
    """Its neighbours are scaled, so its columns are too; the format stores scales in float16."""
    recipe = Recipe(str(tiny(num_key_value_heads=4)), "W4A16g32sym", "smoothquant", "gptq", "builtin", 2, 32)
    bitwright.quantize(replace(recipe, exclude="*.k_proj"), tmp_path / "out")
    name = "model.layers.0.self_attn.k_proj.weight"
    now, before = (Checkpoint.open(folder).read(name) for folder in (tmp_path / "out", Path(recipe.model)))
    assert now.dtype == before.dtype == torch.bfloat16
    ratio = now.float() / before.float()
    assert ratio.mean(dim=0).max() > 1.05 * ratio.mean(dim=0).min()
    assert (ratio.std(dim=0) < 0.01 * ratio.mean(dim=0)).all(), "whole columns are scaled"


@pytest.mark.parametrize("format", [None, "compressed-tensors", "bitwright", "gptq", "dense", "gguf"])
@pytest.mark.parametrize("calibration", [None, "builtin"])
def test_every_format_that_mixes(
    format: str | None, calibration: str | None, tiny: Checkpoints, tmp_path: Path
) -> None:
    mix: dict[str, Any] = {"scheme_for": {f"*.{DOWN}": "W8A16g32sym"}, "exclude": "*.1.self_attn.o_proj"}
    recipe = Recipe(
        str(tiny(num_key_value_heads=4, eos_token_id=0)), "W4A16g32sym", "rtn", format, calibration, 2, 32, **mix
    )
    out = tmp_path / ("out.gguf" if format == "gguf" else "out")
    result = bitwright.quantize(recipe, out)
    assert result.linears == 13
    checked = bitwright.verify(out, recipe.model) if format != "dense" else None
    assert checked is None or checked.passed, checked
    if format == "gguf":
        return
    rows = {row.name: row for row in bitwright.inspect(out).linears}
    if format != "dense":
        down, up = rows[f"{BLOCKS[0]}.{DOWN}"], rows[f"{BLOCKS[0]}.mlp.up_proj"]
        assert down.bits_per_weight > 8 > 5 > up.bits_per_weight > 4
        assert rows["model.layers.1.self_attn.o_proj"].dtype != "packed"
        loaded, ours = bitwright.load(out, device="cpu", dtype="float32"), load_codes(QuantizedFolder.open(out))
        tokens = torch.arange(24)[None]
        with torch.inference_mode():
            logits = ours(tokens).logits
            apart = (loaded(tokens).logits - logits).square().mean().sqrt() / logits.std()
        assert apart < 0.01, "what transformers computes is what was written"


def test_an_export_keeps_the_schemes(tiny: Checkpoints, tmp_path: Path) -> None:
    recipe = Recipe(str(tiny(num_key_value_heads=4)), "W4A16g32sym", "rtn", scheme_for=f"*.{DOWN}=W8A16g32sym")
    bitwright.quantize(recipe, tmp_path / "first")
    for number, format in enumerate(("gptq", "bitwright", "compressed-tensors")):
        source = tmp_path / ("first" if not number else str(number - 1))
        exported = bitwright.export(source, tmp_path / str(number), format=format)
        assert exported.exact == exported.linears == 14
    before, after = (QuantizedFolder.open(tmp_path / name) for name in ("first", "2"))
    for linear in before.linears:
        assert before.read(linear).grid == after.read(linear).grid
        assert torch.equal(before.read(linear).codes, after.read(linear).codes)


@pytest.mark.parametrize("calibration", [None, "builtin"])
def test_what_a_run_writes_repeats_it(calibration: str | None, tiny: Checkpoints, tmp_path: Path) -> None:
    method = "rtn" if calibration is None else "gptq"
    recipe = Recipe(str(tiny()), "W4A16g32", method, "bitwright", calibration, 2, 32, quantize_lm_head=True, **MIXED)
    recipe = replace(recipe, scheme_for=f"{recipe.scheme_for},lm_head=W8A16")
    bitwright.quantize(recipe, tmp_path / "first")
    written = json.loads((tmp_path / "first/allocation.json").read_text())
    assert written["scheme"] == "W4A16g32" and len(written["linears"]) == 15
    assert written["linears"]["lm_head"] == "W8A16"
    assert written["linears"] == {name: own_scheme(name) for name in written["linears"]} | {"lm_head": "W8A16"}
    again = replace(
        recipe, scheme=None, scheme_for=None, exclude=None, allocation=str(tmp_path / "first/allocation.json")
    )
    bitwright.quantize(again, tmp_path / "second")
    first, second = contents(tmp_path / "first"), contents(tmp_path / "second")
    assert first.pop("bitwright.json") != second.pop("bitwright.json"), "the recipes differ"
    assert first == second


def test_a_pattern_counts_before_the_file(tiny: Checkpoints, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"scheme": "W4A16g32", "linears": {f"{BLOCKS[0]}.{DOWN}": "W8A16"}}))
    recipe = Recipe(str(tiny()), method="rtn", allocation=str(file), scheme_for=f"*.{DOWN}=W2A16g16")
    bitwright.quantize(recipe, tmp_path / "out")
    model = QuantizedFolder.open(tmp_path / "out")
    assert [model.read(f"{block}.{DOWN}").grid.bits for block in BLOCKS] == [2, 2]


def test_killed_it_goes_on_and_another_allocation_does_not(tiny: Checkpoints, tmp_path: Path) -> None:
    recipe = Recipe(str(tiny()), "W4A16g32", "rtn", scheme_for=f"*.{DOWN}=W8A16")
    with pytest.raises(KeyboardInterrupt):
        bitwright.quantize(recipe, tmp_path / "out", listener=_stopping)
    with pytest.raises(bitwright.UserError, match=r"begun with other settings:(?s:.)*down_proj: 'W8A16' -> 'W3A16'"):
        bitwright.quantize(replace(recipe, scheme_for=f"*.{DOWN}=W3A16"), tmp_path / "out")
    bitwright.quantize(recipe, tmp_path / "out")
    assert QuantizedFolder.open(tmp_path / "out").read(f"{BLOCKS[0]}.{DOWN}").grid.bits == 8


def test_killed_it_goes_on_if_the_same_schemes_are_said_in_other_words(tiny: Checkpoints, tmp_path: Path) -> None:
    recipe = Recipe(str(tiny()), "W4A16g32", "rtn")
    first = recipe.changed(scheme_for=["*.q_proj=W8A16", "*.down_proj=W3A16g32"], exclude="*.0.mlp.up_proj")
    names = [f"{block}.mlp.down_proj" for block in BLOCKS]
    second = recipe.changed(
        scheme_for=f"{','.join(names)}=W3A16g32,*.self_attn.q_proj=W8A16", exclude="*.layers.0.*.up_proj"
    )
    with pytest.raises(KeyboardInterrupt):
        bitwright.quantize(first, tmp_path / "out", listener=_stopping)
    assert bitwright.quantize(second, tmp_path / "out").resumed
    with pytest.raises(KeyboardInterrupt):
        bitwright.quantize(first, tmp_path / "other", listener=_stopping)
    with pytest.raises(bitwright.UserError, match=r"begun with other settings:(?s:.)*kept: "):
        bitwright.quantize(first.changed(exclude="*.mlp.up_proj"), tmp_path / "other")


def _stopping(progress: Any) -> None:
    if progress.done:
        raise KeyboardInterrupt


def test_the_plan_counts_it(tiny: Checkpoints) -> None:
    plain = bitwright.plan(Recipe(str(tiny()), "W4A16g32", "rtn"))
    mixed = bitwright.plan(Recipe(str(tiny()), "W4A16g32", "rtn", scheme_for="*=W8A16g32"))
    assert mixed.bits_per_weight == plain.bits_per_weight + 4 + 4 / 32 and mixed.bytes_out > plain.bytes_out
    assert mixed.scheme == "W8A16g32" and not mixed.notes, "no linear has the default"
    most = bitwright.plan(Recipe(str(tiny()), "W4A16g32", "rtn", scheme_for="*.mlp.*=W8A16g32,*_attn.*=W3A16g32"))
    assert most.scheme == "W3A16g32" and most.notes == ("schemes of their own: W8A16g32 for 6 linears",)


def test_the_result_names_the_scheme_that_the_linears_have(tiny: Checkpoints, tmp_path: Path) -> None:
    recipe = Recipe(str(tiny()), "W4A16g32", "rtn", scheme_for="*=W8A16g32")
    result = bitwright.quantize(recipe, tmp_path / "out")
    assert result.scheme == bitwright.inspect(tmp_path / "out").scheme == "W8A16g32"
    assert json.loads((tmp_path / "out/bitwright.json").read_text())["scheme"] == "W8A16g32"
    plain = bitwright.quantize(recipe.changed(scheme="W8A16g32", scheme_for=None), tmp_path / "plain")
    assert plain.scheme == result.scheme
    files = ("model.safetensors", "config.json", "allocation.json")
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes() for name in files)


@pytest.mark.parametrize("calibration", [None, "builtin"])
@pytest.mark.parametrize(("how", "says"), [
    ({"scheme_for": "*.down=W8A16"}, r"--scheme-for \*\.down fits no linear; near it: .*down_proj.*\* stands for any"),
    ({"scheme_for": "W8A16"}, "--scheme-for 'W8A16' is no PATTERN=SCHEME; write"),
    ({"scheme_for": "*.down_proj=W9A16"}, r"--scheme-for \*\.down_proj: scheme 'W9A16' asks for weights of 9 bits"),
    (
        {"scheme_for": "*.0.*=W8A16,*.q_proj=W3A16"},
        r"\*\.0\.\*=W8A16 and --scheme-for \*\.q_proj=W3A16 both fit model\.layers\.0\.self_attn\.q_proj, and "
        r"disagree; make one of the patterns narrower: --scheme-for 'model\.layers\.1\.self_attn\.q_proj=W3A16'",
    ),
    (
        {"scheme_for": "*=W8A16,*_proj=W3A16,"},
        r"\*=W8A16 and --scheme-for \*_proj=W3A16 both fit .*disagree; leave one of them out; an --allocation file",
    ),
    (
        {"scheme_for": "*=W8A16,*.q_proj,*.k_proj=W3A16"},
        r"--scheme-for '\*\.v_proj,\*\.o_proj,\*\.gate_proj,\*\.up_proj,\*\.down_proj=W8A16' in the place of \*=W8A16",
    ),
    ({"scheme_for": "lm_head=W8A16"}, r"--scheme-for lm_head fits lm_head alone, .*--quantize-lm-head quantizes it"),
    ({"scheme_for": "*.q_proj=W8A16", "exclude": "*.q_proj"}, r"fits .*q_proj and 1 more alone, .* --exclude says"),
    (
        {"scheme_for": "*.q_proj=W8A16,*layernorm*=W8A16"},
        r"layernorm\* fits .*norm and 3 more alone, which stay in full precision: .* they are no linears",
    ),
    ({"scheme_for": "*.0.*=W8A16", "exclude": "*.0.*"}, r"fits \S+ and 6 more alone, which stay in full precision"),
    ({"scheme": "W8A16g32real", "format": "gguf"}, "gguf cannot hold 8-bit weights with a real-valued zero in these"),
    ({"scheme_for": "*.q_proj=W4A8"}, r"has other activations or KV cache than W4A16g32.*; write W4A16"),
    ({"scheme_for": "*.q_proj=mlc:q4f16_1"}, "the grid of an engine is that of the whole model"),
    (
        {"scheme_for": "*.q_proj=W4A16g48"},
        r"q_proj \[64, 64\] under scheme W4A16g48 \(--scheme-for \*\.q_proj=W4A16g48\): .*groups of 48; what divides",
    ),
    (
        {"scheme_for": "*.q_proj=W8A16g32", "format": "awq"},
        r"awq cannot hold 8-bit asymmetric weights in these groups, which scheme W8A16g32 of .*q_proj \(--scheme-for "
        r"\*\.q_proj=W8A16g32\) .*The nearest scheme that it holds is W4A16g32\.",
    ),
    (
        {"scheme_for": "*.q_proj=W4A16g64", "format": "awq"},
        r"format awq has one scheme for all linears, and .*q_proj is to have W4A16g64 beside W4A16g32 \(--scheme-for ",
    ),
    ({"scheme_for": "*.q_proj=W8A16g32", "engines": "vllm"}, r"vllm cannot run .* \(--scheme-for \*\.q_proj=W8"),
    (
        {"scheme_for": "*.q_proj=W8A16g32sym", "scheme": "W4A16g32sym", "engines": "llama.cpp", "format": "gptq"},
        r"llama\.cpp does not load",
    ),
    (
        {"scheme_for": "*.q_proj=W4A16g32sym", "format": "gptq"},
        r"asymmetric weights, and W4A16g32sym is not as W4A16g32 there \(--scheme-for \*\.q_proj=W4A16g32sym\)",
    ),
    ({"scheme": "W8A16g64", "format": "gguf"}, r"The nearest scheme that it holds is W8A16g64sym\."),
    ({"exclude": "*.k"}, r"--exclude \*\.k fits no tensor of the checkpoint"),
    ({"exclude": "*"}, r"nothing to quantize"),
])  # fmt: skip
def test_refused_before_the_work(
    how: dict[str, Any], says: str, calibration: str | None, tiny: Checkpoints, tmp_path: Path
) -> None:
    method = "rtn" if calibration is None else "gptq"
    recipe = Recipe(str(tiny()), "W4A16g32", method, calibration=calibration, samples=2, seqlen=32)
    with pytest.raises((RecipeError, SchemeError), match=f"(?s){says}"):
        bitwright.quantize(recipe.changed(**how), tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("content", "says"), [
    ("", "not JSON"), ("[]", "a JSON object was expected"), ("{}", "its keys are"),
    ('{"linears": {}}', "says no scheme for the other linears; give --scheme"),
    ('{"scheme": "W4A16", "linears": []}', r"its linears are \[\]"),
    ('{"scheme": "W4A16", "linears": {"model.layers.9.mlp.up_proj": "W8A16"}}', r"model: model\S+ is no linear"),
    ('{"scheme": "W4A16", "linears": {"lm_head": "W8A16"}}', "gives lm_head W8A16, .*--quantize-lm-head"),
    ('{"scheme": "W4A16", "linears": {"model.layers.0.mlp.up_proj": 8}}', "is 8; a scheme is a text"),
    ('{"scheme": "W4A16", "linears": {"model.layers.0.mlp.up_proj": "W8"}}', "up_proj': 'W8' is no scheme"),
    ('{"scheme": "W4A16", "linears": {"model.layers.0.mlp.up_proj": "W8A8"}}', "other activations"),
    ('{"scheme": "W4A16", "linears": {}, "more": 1}', "its keys are"),
])  # fmt: skip
def test_a_file_that_is_no_allocation_of_this_model(content: str, says: str, tiny: Checkpoints, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    recipe = Recipe(str(tiny()), method="rtn", allocation=str(tmp_path / "a.json"))
    with pytest.raises((RecipeError, SchemeError), match=f"(?s)--allocation .*a.json.*{says}"):
        bitwright.plan(recipe)
    with pytest.raises(RecipeError, match=r"--allocation .*b\.json cannot be read: No such file"):
        bitwright.plan(replace(recipe, allocation=str(tmp_path / "b.json")))


def test_a_file_that_names_only_some_linears(tiny: Checkpoints, tmp_path: Path) -> None:
    """Such as one of a model with fewer blocks; what is left gets the default, and that is said."""
    whole = json.loads(_allocation_of(tiny(num_hidden_layers=1), tmp_path / "one"))
    (tmp_path / "a.json").write_text(json.dumps(whole))
    recipe = Recipe(str(tiny()), "W3A16g32", "rtn", allocation=str(tmp_path / "a.json"))
    says = "the allocation file names 8 of 15 linears; the others get W3A16g32. It may be of a model with 1 blocks"
    assert any(note.startswith(says) for note in bitwright.plan(recipe).notes)
    result = bitwright.quantize(recipe, tmp_path / "out")
    assert sum(note.startswith(says) for note in result.notes) == 1
    account = json.loads((tmp_path / "out/bitwright.json").read_text())
    assert any(note.startswith(says) for note in account["notes"])
    (tmp_path / "a.json").write_text(json.dumps({"linears": {f"{BLOCKS[0]}.{DOWN}": "W8A16"}}))
    (note,) = (note for note in bitwright.plan(recipe).notes if "allocation" in note)
    assert note == "the allocation file names 1 of 15 linears; the others get W3A16g32"
    (tmp_path / "a.json").write_text(_allocation_of(tiny(), tmp_path / "two"))
    assert not any("allocation" in note for note in bitwright.plan(recipe).notes)


def _allocation_of(model: Path, folder: Path) -> str:
    bitwright.quantize(Recipe(str(model), "W4A16g32", "rtn"), folder)
    return (folder / "allocation.json").read_text()


def test_a_file_with_a_byte_order_mark(tiny: Checkpoints, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"linears": {f"{BLOCKS[0]}.{DOWN}": "W8A16"}}), encoding="utf-8-sig")
    plan = bitwright.plan(Recipe(str(tiny()), "W4A16g32", "rtn", allocation=str(tmp_path / "a.json")))
    assert "schemes of their own: W8A16 for 1 linear" in plan.notes


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_file_of_nothing_but_null(method: str, tiny: Checkpoints, tmp_path: Path) -> None:
    linears = json.loads(_allocation_of(tiny(), tmp_path / "first"))["linears"]
    (tmp_path / "a.json").write_text(json.dumps({"linears": dict.fromkeys(linears)}))
    text = None if method == "rtn" else "builtin"
    recipe = Recipe(str(tiny()), "W4A16g32", method, calibration=text, allocation=str(tmp_path / "a.json"))
    with pytest.raises(RecipeError, match=r"--allocation leaves nothing: give linears in the file a scheme") as error:
        bitwright.plan(recipe)
    assert "--include" not in str(error.value)


def test_what_counts_before_what(tiny: Checkpoints, tmp_path: Path) -> None:
    """--exclude before --scheme-for before the file; --quantize-lm-head before the file's null."""
    down = [f"{block}.{DOWN}" for block in BLOCKS]
    linears = {down[0]: None, f"{BLOCKS[0]}.{Q}": "W8A16", "lm_head": None}
    (tmp_path / "a.json").write_text(json.dumps({"linears": linears}))
    recipe = Recipe(str(tiny()), "W4A16g32", "rtn", allocation=str(tmp_path / "a.json"), quantize_lm_head=True)
    recipe = replace(recipe, scheme_for="*.up_proj,*.down_proj=W2A16g16", exclude=f"*.0.{Q},{down[1]}")
    bitwright.quantize(recipe, tmp_path / "out")
    model = QuantizedFolder.open(tmp_path / "out")
    bits = {name: model.read(name).grid.bits for name in model.linears}
    assert (bits[down[0]], bits[f"{BLOCKS[1]}.mlp.up_proj"], bits["lm_head"]) == (2, 2, 4)
    assert not {down[1], f"{BLOCKS[0]}.{Q}"} & bits.keys() and len(bits) == 13


def test_a_tied_output_layer_can_be_excluded(tiny: Checkpoints) -> None:
    recipe = Recipe(str(tiny(tie_word_embeddings=True)), "W4A16g32", "rtn", quantize_lm_head=True)
    assert bitwright.plan(recipe).linears == 15
    assert bitwright.plan(replace(recipe, exclude="lm_head")).linears == 14


@pytest.mark.parametrize(("how", "says"), [
    ({"format": "awq"}, "awq cannot hold 8-bit asymmetric weights"), ({"engines": "vllm"}, "vllm cannot run scheme W8"),
])  # fmt: skip
def test_a_refusal_names_the_file_that_asked(how: dict[str, Any], says: str, tiny: Checkpoints, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"linears": {f"{BLOCKS[0]}.{DOWN}": "W8A16"}}))
    recipe = Recipe(str(tiny()), "W4A16g32", "rtn", allocation=str(tmp_path / "a.json"))
    with pytest.raises(RecipeError, match=rf"{says}.* of model\.layers\.0\.{DOWN} \(--allocation .*a\.json\)"):
        bitwright.plan(recipe.changed(**how))


def test_an_engine_is_asked_for_the_schemes_that_linears_have(tiny: Checkpoints) -> None:
    recipe = Recipe(str(tiny()), "W3A16g32", "rtn", scheme_for="*=W4A16g32sym", engines="vllm")
    assert bitwright.plan(recipe).scheme == "W4A16g32sym"
    with pytest.raises(RecipeError, match="vllm cannot run scheme W3A16g32"):
        bitwright.plan(recipe.changed(scheme_for="*.self_attn.*=W4A16g32sym"))
