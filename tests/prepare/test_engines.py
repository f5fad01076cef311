"""What engines run is asked before any work; the nearest scheme that is named does run."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import Checkpoints
from tests.plugin.experts import save_original

import bitwright
from bitwright import api
from bitwright.core.engine import Engine, engine_named, engines
from bitwright.core.errors import RecipeError
from bitwright.core.grid import FULL, Grid, Tile
from bitwright.core.recipe import Recipe
from bitwright.core.registry import find, format_of, names
from bitwright.prepare.engine_choice import for_engines
from bitwright.prepare.question import Question

WIDE = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
"""Sizes that every group divides."""


def test_every_row_is_of_a_format_and_says_how_it_was_checked() -> None:
    assert api.engines() and all(engine.ways for engine in api.engines())
    for engine in api.engines():
        assert {way.format for way in engine.ways} <= set(names("formats"))
        assert all(re.search(r"\d+\.\d+", way.checked) for way in engine.ways)


def test_the_page_names_the_versions_of_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "engines.md").read_text(encoding="utf-8")
    for way in (way for engine in api.engines() for way in engine.ways):
        versions = re.findall(r"\d+\.\d+\.\d+|[0-9a-f]{7}(?=\))", way.checked)
        assert versions and all(version in page for version in versions), way.checked
        assert re.search(rf"\| {way.format}\b", page), way.format


def test_the_page_says_what_one_model_may_mix() -> None:
    page = (Path(__file__).parents[2] / "docs" / "engines.md").read_text(encoding="utf-8")
    _, section = page.split("## What one model may mix\n")
    rows = re.findall(r"^\|.*\| (\S+) \| (yes|no)[^|]*\| (yes|no) \|", section, re.MULTILINE)
    ways = {
        (engine.name, way.format): (way.format, "yes" if way.mixes else "no", "yes" if way.leaves else "no")
        for engine in map(engine_named, ("transformers", "vllm", "llama.cpp", "mlc", "gptqmodel"))
        for way in engine.ways
    }
    assert rows == list(ways.values())
    assert {name for name, _ in ways} == {engine.name for engine in api.engines()}


def settled(recipe: Recipe) -> Recipe:
    """The recipe with the format that its engines lead to."""
    return for_engines(Question.of(recipe), "cpu").recipe


@pytest.mark.parametrize(("scheme", "engines", "format"), [
    ("W4A16g128", "vllm", "compressed-tensors"), ("W4A16g32", "llama.cpp", "gguf"), ("W3A16g128", "gptqmodel", "gptq"),
    ("W4A16g128", "vllm, gptqmodel", "awq"), ("mlc:q3f16_1", "mlc", "mlc"), ("W4A16g128", "mlc", "mlc"),
    ("W4A16sym", "mlc", "mlc"), ("W4A16g128", "transformers,vllm", "compressed-tensors"),
    ("W7A16", "llama.cpp", "gguf"),
])  # fmt: skip
def test_the_format_is_chosen(scheme: str, engines: str, format: str, tiny: Checkpoints) -> None:
    assert settled(Recipe(str(tiny(**WIDE)), scheme, "rtn", engines=engines)).format == format


@pytest.mark.parametrize(("scheme", "engine", "nearest"), [
    ("W4A16g128ic", "llama.cpp", "W4A16g128"), ("W3A16", "vllm", "W4A16"), ("W4A4", "llama.cpp", "W4A16"),
    ("W5A16g64", "gptqmodel", "W4A16g64"), ("W2A16g64ic", "mlc", "W2A16g64"), ("W4A16g96", "vllm", "W4A16g64"),
    ("W8A16", "llama.cpp", "W8A16sym"), ("W5A16sym", "mlc", "W4A16sym"), ("mlc:q4f16_1", "vllm", "W4A16g32sym"),
])  # fmt: skip
def test_what_does_not_run_is_refused_with_the_nearest_that_does(
    scheme: str, engine: str, nearest: str, tiny: Checkpoints, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as error:
        bitwright.quantize(Recipe(str(tiny(**WIDE)), scheme, "rtn", engines=engine), tmp_path / "out")
    found = re.search(r"nearest scheme that it runs is (\S+);", str(error.value))
    assert found is not None and not any(tmp_path.iterdir())
    assert settled(Recipe(str(tiny(**WIDE)), found[1], "rtn", engines=engine)).format
    assert found[1] == nearest


@pytest.mark.parametrize(("how", "says"), [
    ({"engines": "llamacpp"}, "there is no engine 'llamacpp'; did you mean llama.cpp"),
    ({"engines": "llama.cpp", "method": "easyquant"}, r"outliers \(--outliers 0 keeps none\)"),
    ({"engines": "llama.cpp", "format": "gptq"}, "does not load format gptq; it loads gguf"),
    ({"engines": "llama.cpp,vllm"}, r"no one format .*llama\.cpp gguf; vllm comp.*--engine vllm alone.* --format gguf"),
    ({"engines": "transformers", "format": "dense"}, "loads format dense as any folder, in 16 bits; .*formats: comp"),
    ({"engines": "transformers", "format": "gptq"}, "loads format gptq with gptqmodel and optimum beside it"),
    ({"engines": "vllm", "format": "gptq"}, r"W4A16g32sym, or leave --format out: vllm runs W4A16g32 in compress"),
    ({"engines": ""}, "engines names none; take gptqmodel, llama.cpp"),
    ({"engines": "vllm", "method": "adadim"}, r"the method may choose.*It runs this scheme with --axis oc;"),
    ({"engines": "vllm", "method": "easyquant", "axis": "auto"}, "this scheme with --outliers 0 --axis oc;"),
    ({"engines": "vllm", "method": "easyquant", "scheme": "W3A16"}, "that it runs is W4A16 with --outliers 0;"),
])  # fmt: skip
def test_refused(how: dict[str, Any], says: str, tiny: Checkpoints) -> None:
    with pytest.raises(RecipeError, match=says):
        settled(Recipe(str(tiny()), **({"scheme": "W4A16g32", "method": "rtn"} | how)))


COMMAND = r"bitwright export OUTPUT --format (\S+) --output (\S+?)(?:;|$)"


@pytest.mark.parametrize(("scheme", "engines", "first"), [
    ("W4A16g128", "llama.cpp,vllm", "vllm"), ("W4A16g128sym", "mlc,llama.cpp,gptqmodel", "gptqmodel"),
    ("W4A16g32sym", "mlc,llama.cpp", None), ("mlc:q4f16_1", "mlc,transformers", "transformers"),
    ("W4A16g128", "mlc,vllm,transformers,llama.cpp", "vllm"),
])  # fmt: skip
def test_what_is_advised_for_several_engines_works(
    scheme: str, engines: str, first: str | None, tiny: Checkpoints, tmp_path: Path
) -> None:
    recipe = Recipe(str(tiny(**WIDE, eos_token_id=0)), scheme, "rtn", engines=engines)
    with pytest.raises(RecipeError) as error:
        settled(recipe)
    begin = re.search(r"Quantize with (?:--engine (\S+) alone|--format (\S+) and no --engine),", str(error.value))
    assert begin is not None and begin[1] == first, str(error.value)
    bitwright.quantize(replace(recipe, engines=begin[1], format=begin[2]), tmp_path / "OUTPUT")
    exports = re.findall(COMMAND, str(error.value))
    assert exports
    for format, output in exports:
        found = bitwright.export(tmp_path / "OUTPUT", tmp_path / output, format=format)
        assert found.codes_kept == found.linears


@pytest.mark.parametrize(("sizes", "scheme", "says"), [
    ({"hidden_size": 80, "intermediate_size": 100, "head_dim": 20}, "W4A16sym",
     r"self_attn\.q_proj, k_proj, v_proj: 80 input features are no multiple of 32.*\. No scheme helps;"),
    ({"intermediate_size": 48}, "W4A16sym", r"mlp\.down_proj: 48 input features"),
    ({"head_dim": 24, "num_key_value_heads": 1}, "W4A16sym", r"q_proj, k_proj, v_proj: 144 output features"),
    ({"head_dim": 24, "num_key_value_heads": 1}, "W4A16", r"compressed-tensors, awq, and \S+q_proj, k_proj, v_proj: 1"),
    ({"intermediate_size": 48}, "W3A16", r"3-bit asymmetric weights\. No scheme helps: the nearest .* 48 input"),
])  # fmt: skip
def test_sizes_that_the_kernel_of_an_engine_does_not_take(
    sizes: dict[str, int], scheme: str, says: str, tiny: Checkpoints
) -> None:
    recipe = Recipe(str(tiny(**sizes)), scheme, "rtn", engines="vllm")
    with pytest.raises(RecipeError, match=says):
        api.plan(recipe)
    assert api.plan(replace(recipe, engines="transformers")).linears == 14


def test_outputs_of_joined_linears_count_together(tiny: Checkpoints) -> None:
    recipe = Recipe(str(tiny(head_dim=8, num_key_value_heads=2)), "W4A16g32", "rtn", engines="vllm")
    assert api.plan(recipe).linears == 14, "16 outputs of k and of v are no multiple of 32, 64 of all three are"
    alone = Recipe(
        str(tiny(hidden_size=96, head_dim=24, num_key_value_heads=1)), "W4A16g32", "rtn", engines="gptqmodel"
    )
    with pytest.raises(RecipeError, match=r"self_attn\.k_proj: 24 output features are no multiple of 16"):
        api.plan(alone)
    assert api.plan(replace(alone, format="awq", engines=None)).format == "awq"


def test_an_output_layer_that_an_engine_does_not_load(tiny: Checkpoints) -> None:
    recipe = Recipe(str(tiny()), "W4A16g32", "rtn", engines="vllm", quantize_lm_head=True)
    assert api.plan(recipe).format == "awq", "compressed-tensors comes first, and vLLM loads no packed lm_head of it"
    with pytest.raises(RecipeError, match=r"lm_head: a quantized output layer.*leave --quantize-lm-head out.* in awq"):
        api.plan(replace(recipe, format="compressed-tensors"))
    with pytest.raises(RecipeError, match=r"lm_head: 264 output features are no multiple of 64, which it needs"):
        api.plan(replace(recipe, model=str(tiny(vocab_size=264))))


@pytest.mark.parametrize(("exclude", "says"), [
    ("*.k_proj", r"vllm cannot run \S+ so: in compressed-tensors and awq it does not run "
     r"model\.layers\.0\.self_attn\.q_proj at W4A16g32 beside k_proj in full precision, which it joins: leave all of "
     r"them in full precision, --exclude 'model\.layers\.\*\.self_attn\.q_proj,model\.layers\.\*\.self_attn\.v_proj', "
     "or none; bitwright engines"),
    ("model.layers.1.mlp.up_proj", r"1\.mlp\.gate_proj at W4A16g32 beside up_proj .*'model\.layers\.1\.mlp\.gate_pro"),
])  # fmt: skip
def test_a_linear_left_alone_beside_those_it_is_joined_with(exclude: str, says: str, tiny: Checkpoints) -> None:
    recipe = Recipe(str(tiny()), "W4A16g32", "rtn", engines="vllm", exclude=exclude)
    with pytest.raises(RecipeError, match=says) as error:
        api.plan(recipe)
    advice = re.search(r"--exclude '(\S+)'", str(error.value))
    assert advice is not None
    assert api.plan(replace(recipe, exclude=f"{exclude},{advice[1]}")).format == "compressed-tensors"
    for engine in ("transformers", "gptqmodel"):
        assert api.plan(replace(recipe, engines=engine)).linears < 14


def test_linears_left_alone_beside_an_engine_that_leaves_none(tiny: Checkpoints) -> None:
    recipe = Recipe(str(tiny(eos_token_id=0)), "W4A16g32sym", "rtn", engines="mlc", exclude="*.o_proj")
    with pytest.raises(RecipeError, match=r"mlc cannot run .*0\.self_attn\.o_proj in full precision .*leave --exclude"):
        api.plan(recipe)


@pytest.mark.parametrize(("scheme", "exceptions", "engines", "expected"), [
    ("W4A16g32", {"self_attn.o_proj": "W4A16g64"}, "vllm", "compressed-tensors"),
    ("W4A16g32", {"self_attn.o_proj": "W4A16g64sym"}, "vllm", "compressed-tensors"),
    ("W4A16g32", {"self_attn.o_proj": "W3A16g64"}, "gptqmodel", "gptq"),
    ("W4A16g32", {"self_attn.q_proj": "W8A16sym"}, "llama.cpp", "gguf"),
    ("W4A16g32sym", {"self_attn.o_proj": "W4A16g64sym"}, "gptqmodel,vllm", "gptq"),
    ("W4A16g32", {"self_attn.o_proj": "W8A16g32"}, "vllm", r"of \S+0\.self_attn\.o_proj \(--sch.*is W4A16g32;"),
    ("W4A16g32", {"self_attn.q_proj": "W4A16g64"}, "vllm", r"q_proj at W4A16g64 beside k_proj at W4A16g32, which it"),
    ("W4A16g32sym", {"mlp.up_proj": "W3A16g40sym"}, "mlc", r"so \(--.*\): no one format of it holds W4A16g32sym and"),
    ("W4A16g32sym", {"mlp.up_proj": "W4A16g64sym"}, "mlc", "in mlc it does not run .* at W4A16g64sym: all linears"),
    ("W4A16g32sym", {"self_attn.o_proj": None}, "mlc", "in mlc it does not run .*o_proj in full precision besi"),
])  # fmt: skip
def test_schemes_that_differ(
    scheme: str, exceptions: dict[str, str | None], engines: str, expected: str, tiny: Checkpoints
) -> None:
    ((name, text),) = exceptions.items()
    other = {"exclude": f"*.{name}"} if text is None else {"scheme_for": [f"*.{name}={text}"]}
    recipe = Recipe(str(tiny(**WIDE)), scheme, "rtn", engines=engines, **other)
    if expected in names("formats"):
        assert settled(recipe).format == expected
        return
    with pytest.raises(RecipeError, match=expected):
        settled(recipe)


def test_one_reason_for_each_format(tiny: Checkpoints) -> None:
    with pytest.raises(RecipeError) as error:
        settled(Recipe(str(tiny(**WIDE)), "W4A16g64", "rtn", engines="mlc"))
    assert str(error.value).count("in mlc") == 1
    assert "4-bit asymmetric weights in groups of 64, only of multiples of 128" in str(error.value)


def test_the_groups_of_the_table_are_those_that_the_format_holds() -> None:
    restricted = [way for engine in api.engines() for way in engine.ways if way.multiples]
    assert {way.format for way in restricted} == {"gguf", "mlc"}
    for format, bits, symmetric in product(("gguf", "mlc"), range(2, 9), (True, False)):
        grid = Grid.integers(bits, symmetric)
        ways = [way for way in restricted if way.format == format]
        ways = [way for way in ways if bits in (way.symmetric if symmetric else way.asymmetric)]
        for size in range(8, 520, 8):
            runs = any(size % multiple == 0 for way in ways for multiple in way.multiples)
            assert runs == find("formats", format).holds(grid, Tile(1, size), False), (format, grid, size)


def test_any_architecture_says_which_were_tried() -> None:
    for way in (way for engine in api.engines() for way in engine.ways):
        assert way.models is not None or "llama" in way.checked, way.checked


@pytest.mark.parametrize("engine", engines(), ids=lambda engine: str(engine.name))
def test_the_architectures_of_an_engine_are_those_its_formats_are_written_for(engine: Engine) -> None:
    """A format that is written for one more is run with it, and then stands in the engine's table."""
    for name in engine.formats:
        listed = [set(way.models) if way.models else None for way in engine.ways if way.format == name]
        written = format_of(name).models
        assert set(written or ()) == set().union(*filter(None, listed)), name
        assert (written is None) is (None in listed), name


def test_an_architecture_that_the_engine_does_not_know(tiny: Checkpoints, tmp_path: Path) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "neox")
    with pytest.raises(RecipeError, match=r"the architecture 'gpt_neox', only llama.*No scheme helps"):
        settled(Recipe(str(tmp_path / "neox"), "W4A16g32", "rtn", engines="llama.cpp"))


@pytest.mark.parametrize("none", ["0", "0.00", "0%"])
def test_outliers_may_be_left_out(none: str, tiny: Checkpoints) -> None:
    recipe = Recipe(str(tiny()), "W4A16g32", "easyquant", engines="llama.cpp", outliers=none)
    assert settled(recipe).format == "gguf"


def test_zero_points_in_groups_of_128_are_for_mlc_with_llama_alone(tiny: Checkpoints, tmp_path: Path) -> None:
    assert settled(Recipe(str(tiny(**WIDE)), "W4A16g128", engines="mlc")).format == "mlc"
    other = shutil.copytree(tiny(**WIDE), tmp_path / "mistral")
    config = json.loads((other / "config.json").read_text()) | {"architectures": ["MistralForCausalLM"]}
    (other / "config.json").write_text(json.dumps(config | {"model_type": "mistral"}))
    with pytest.raises(RecipeError, match=r"4-bit asymmetric weights.*that it runs is W4A16g128sym;"):
        settled(Recipe(str(other), "W4A16g128", engines="mlc"))


NARROW = {"hidden_size": 96, "intermediate_size": 192, "head_dim": 24}
"""Groups of 64 and 128 do not divide the rows, and keys and values have 48 outputs, which gptq does not pack."""


@pytest.mark.parametrize(("scheme", "engine", "nearest"), [
    ("W3A16g64", "vllm", "W4A16g32"), ("W5A16g64", "gptqmodel", "W4A16g32"), ("W4A16g128ic", "llama.cpp", "W4A16g32"),
    ("W4A16g64", "llama.cpp", "W4A16g32"), ("W4A16g128", "mlc", "W4A16g32sym"), ("W3A16g64", "gptqmodel", "W4A16g32"),
    ("W3A16g64", "vllm,gptqmodel", "W4A16g32"), ("W4A16g64sym", "vllm", "W4A16g32sym"),
])  # fmt: skip
def test_the_nearest_scheme_divides_the_rows_of_the_model(
    scheme: str, engine: str, nearest: str, tiny: Checkpoints
) -> None:
    recipe = Recipe(str(tiny(**NARROW, eos_token_id=0)), scheme, "rtn", engines=engine)
    with pytest.raises(RecipeError) as error:
        api.plan(recipe)
    found = re.search(r"nearest scheme that (?:it runs|they run) is (\S+);", str(error.value))
    assert found is not None and found[1] == nearest, str(error.value)
    assert api.plan(replace(recipe, scheme=found[1])).linears == 14


def test_the_format_is_one_that_packs_the_shapes(tiny: Checkpoints) -> None:
    recipe = Recipe(str(tiny(**NARROW)), "W4A16g32", "rtn", engines="gptqmodel")
    assert api.plan(recipe).format == "awq", "gptq comes first, and packs 32 outputs together"
    assert api.plan(replace(recipe, model=str(tiny(**WIDE)))).format == "gptq"


@pytest.mark.parametrize(("scheme", "says"), [
    ("W4A16g32", r"q_proj \[80, 80\]: 80 input features are no multiple of 32.*\. No scheme helps;"),
    ("W4A16", r"q_proj \[80, 80\]: 80 input features are no multiple of 32.*\. No scheme helps;"),
    ("W4A4", r"No scheme helps: the nearest would be W4A16, and \S*q_proj \[80, 80\]: 80 input features"),
])  # fmt: skip
def test_where_no_scheme_divides_the_rows_that_is_said(scheme: str, says: str, tiny: Checkpoints) -> None:
    recipe = Recipe(str(tiny(hidden_size=80, head_dim=20)), scheme, "rtn", engines="llama.cpp")
    with pytest.raises(RecipeError, match=says) as error:
        api.plan(recipe)
    assert not any(word in str(error.value) for word in ("what divides them", "--exclude", "8, 16, 40"))


@pytest.mark.parametrize(("scheme", "method", "format"), [
    ("W4A4", "rtn", "compressed-tensors"), ("W4A16g32", "rtn", "compressed-tensors"),
    ("W4A16g32ic", "rtn", "bitwright"),
    ("W4A16g32", "easyquant", "compressed-tensors or bitwright"),
])  # fmt: skip
def test_transformers_takes_what_is_decided_later(scheme: str, method: str, format: str, tiny: Checkpoints) -> None:
    recipe = Recipe(str(tiny()), scheme, method, engines="transformers")
    assert api.plan(recipe).format == format
    assert api.plan(replace(recipe, engines=None)).format == format


@pytest.fixture(scope="module")
def of_experts(tiny: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Tiny models by name, in bfloat16: Mixtral and Qwen3Moe have experts one by one, GptOss fused in one tensor."""
    made: dict[str, Path] = {}

    def of(name: str) -> str:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("experts") / name
            save_original(name, made[name], torch.bfloat16)
            (made[name] / "tokenizer.json").write_bytes((tiny() / "tokenizer.json").read_bytes())
        return str(made[name])

    return of


def test_experts_that_transformers_cannot_load_packed_are_in_our_format(of_experts: Callable[[str], str]) -> None:
    recipe = Recipe(of_experts("Mixtral"), "W4A16g32", "rtn", engines="transformers")
    assert api.plan(recipe).format == "bitwright"
    assert api.plan(replace(recipe, scheme="W4A16g32sym")).format == "compressed-tensors"


@pytest.mark.parametrize("model", ["Mixtral", "Qwen3Moe"])
def test_experts_with_zero_points_for_two_engines_are_one_error(model: str, of_experts: Callable[[str], str]) -> None:
    recipe = Recipe(of_experts(model), "W4A16g32", "rtn", engines="transformers,vllm")
    says = (
        r"transformers and vllm cannot run .* under scheme W4A16g32: what is loaded is format compressed-tensors, and "
        r"transformers cannot load model\.layers\.0\.\S*experts\S* from format compressed-tensors.*symmetric\. "
        r"The nearest scheme that they run is W4A16g32sym, or --engine transformers alone, in format bitwright;"
    )
    with pytest.raises(RecipeError, match=says) as error:
        api.plan(recipe)
    assert "--format" not in str(error.value), "nobody has named one"
    assert api.plan(replace(recipe, scheme="W4A16g32sym")).format == "compressed-tensors"
    assert api.plan(replace(recipe, engines="transformers")).format == "bitwright"


def test_fused_experts_for_two_engines_are_one_error(of_experts: Callable[[str], str]) -> None:
    says = (
        r"transformers cannot load model\.layers\.0\.mlp\.experts\.down_proj from format compressed-tensors: .*"
        r"No scheme helps, or --engine transformers alone, in format bitwright;"
    )
    recipe = Recipe(of_experts("GptOss"), "W4A16g32", "rtn", engines="transformers,vllm")
    for asked in (recipe, replace(recipe, scheme="W4A16g32sym")):
        with pytest.raises(RecipeError, match=says):
            api.plan(asked)
    with pytest.raises(RecipeError, match=r"gptqmodel cannot run .*gptq holds no .* fused over 4 experts.*No scheme"):
        api.plan(replace(recipe, engines="gptqmodel"))


def test_experts_go_into_another_format_of_the_engine(of_experts: Callable[[str], str]) -> None:
    recipe = Recipe(of_experts("Mixtral"), "W4A16g32", "rtn", engines="vllm")
    assert api.plan(recipe).format == "awq", "compressed-tensors comes first, and has no zero points of experts"


@pytest.mark.parametrize("asked", [
    "*.0.mlp.experts.1.gate_proj=W4A16g32sym,*.0.self_attn.q_proj=W4A16g32sym",
    "*.experts.0.up_proj=W4A16g32sym",
])  # fmt: skip
def test_experts_of_several_schemes_are_one_error_whose_advice_helps(
    asked: str, of_experts: Callable[[str], str]
) -> None:
    """vLLM joins gate and up of an expert, q, k and v, and gives the experts of a layer one scheme."""
    recipe = Recipe(of_experts("Qwen3Moe"), "W4A16sym", "rtn", scheme_for=asked, engines="vllm")
    with pytest.raises(RecipeError, match=r"all experts of a layer need one scheme.*, in the place of --sch") as error:
        api.plan(recipe)
    advice, replaced = str(error.value).split(", in the place of ")
    assert all(f"--scheme-for {entry}" in replaced for entry in asked.split(","))
    assert api.plan(replace(recipe, scheme_for=re.findall(r"--scheme-for '(\S+)'", advice))).format


def test_what_a_row_says_runs_is_held_by_its_format() -> None:
    for way in (way for engine in api.engines() for way in engine.ways):
        for symmetric, every in ((True, way.symmetric), (False, way.asymmetric)):
            for bits, size in product(every, way.groups or (128,)):
                grid = Grid.integers(bits, symmetric)
                assert find("formats", way.format).holds(grid, Tile(1, size), False), (way.format, grid, size)
                assert not way.channel or find("formats", way.format).holds(grid, Tile(1, FULL), False)
