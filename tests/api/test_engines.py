"""What engines run is asked before any work; the nearest scheme that is named does run."""

import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import bitwright
from bitwright import api
from bitwright.api.engine_choice import for_engines
from bitwright.core.errors import RecipeError
from bitwright.core.recipe import Recipe
from bitwright.core.registry import find, names
from bitwright.core.scheme import FULL, Grid, Tile

from ..conftest import Checkpoints


def test_every_row_is_of_a_format_and_says_how_it_was_checked() -> None:
    for engine in api.engines():
        assert {way.format for way in engine.ways} <= set(names("formats"))
        assert all(re.search(r"\d+\.\d+", way.checked) for way in engine.ways)


def test_the_page_names_the_versions_of_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "engines.md").read_text(encoding="utf-8")
    for way in (way for engine in api.engines() for way in engine.ways):
        versions = re.findall(r"\d+\.\d+\.\d+|[0-9a-f]{7}(?=\))", way.checked)
        assert versions and all(version in page for version in versions), way.checked
        assert re.search(rf"\| {way.format}\b", page), way.format


@pytest.mark.parametrize(("scheme", "engines", "format"), [
    ("W4A16g128", "vllm", "compressed-tensors"), ("W4A16g32", "llama.cpp", "gguf"), ("W3A16g128", "gptqmodel", "gptq"),
    ("W4A16g128", "vllm, gptqmodel", "awq"), ("mlc:q3f16_1", "mlc", "mlc"), ("W4A16g128", "mlc", "mlc"),
    ("W4A16sym", "mlc", "mlc"), ("W4A16g128", "transformers,vllm", "compressed-tensors"),
    ("W7A16", "llama.cpp", "gguf"),
])  # fmt: skip
def test_the_format_is_chosen(scheme: str, engines: str, format: str, tiny: Checkpoints) -> None:
    assert for_engines(Recipe(str(tiny()), scheme, "rtn", engines=engines)).format == format


@pytest.mark.parametrize(("scheme", "engine", "nearest"), [
    ("W4A16g128ic", "llama.cpp", "W4A16g128"), ("W3A16", "vllm", "W4A16"), ("W4A4", "llama.cpp", "W4A16"),
    ("W5A16g64", "gptqmodel", "W4A16g64"), ("W2A16g64ic", "mlc", "W2A16g64"), ("W4A16g96", "vllm", "W4A16g64"),
    ("W8A16", "llama.cpp", "W8A16sym"), ("W5A16sym", "mlc", "W4A16sym"), ("mlc:q4f16_1", "vllm", "W4A16g32sym"),
])  # fmt: skip
def test_what_does_not_run_is_refused_with_the_nearest_that_does(
    scheme: str, engine: str, nearest: str, tiny: Checkpoints, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as error:
        bitwright.quantize(Recipe(str(tiny()), scheme, "rtn", engines=engine), tmp_path / "out")
    found = re.search(r"nearest scheme that it runs is (\S+);", str(error.value))
    assert found is not None and not any(tmp_path.iterdir())
    assert for_engines(Recipe(str(tiny()), found[1], "rtn", engines=engine)).format
    assert found[1] == nearest


@pytest.mark.parametrize(("how", "says"), [
    ({"engines": "llamacpp"}, "there is no engine 'llamacpp'; did you mean llama.cpp"),
    ({"engines": "llama.cpp", "method": "easyquant"}, r"outliers \(--outliers 0 keeps none\)"),
    ({"engines": "llama.cpp", "format": "gptq"}, "does not load format gptq; it loads gguf"),
    ({"engines": "llama.cpp,vllm"}, r"no one format .*llama\.cpp gguf; vllm comp.*export OUTPUT --format comp"),
    ({"engines": ""}, "engines names none; take transformers, vllm"),
    ({"engines": "vllm", "method": "adadim"}, r"the method may choose.*It runs this scheme with --axis oc;"),
    ({"engines": "vllm", "method": "easyquant", "axis": "auto"}, "this scheme with --outliers 0 --axis oc;"),
    ({"engines": "vllm", "method": "easyquant", "scheme": "W3A16"}, "that it runs is W4A16 with --outliers 0;"),
])  # fmt: skip
def test_refused(how: dict[str, str], says: str, tiny: Checkpoints) -> None:
    recipe = Recipe(str(tiny()), **({"scheme": "W4A16g32", "method": "rtn"} | how))  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=says):
        for_engines(recipe)


def test_an_architecture_that_the_engine_does_not_know(tiny: Checkpoints, tmp_path: Path) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "neox")
    with pytest.raises(RecipeError, match=r"the architecture 'gpt_neox', only llama.*No scheme helps"):
        for_engines(Recipe(str(tmp_path / "neox"), "W4A16g32", "rtn", engines="llama.cpp"))


@pytest.mark.parametrize("none", ["0", "0.00", "0%"])
def test_outliers_may_be_left_out(none: str, tiny: Checkpoints) -> None:
    recipe = Recipe(str(tiny()), "W4A16g32", "easyquant", engines="llama.cpp", outliers=none)
    assert for_engines(recipe).format == "gguf"


def test_zero_points_in_groups_of_128_are_for_mlc_with_llama_alone(tmp_path: Path) -> None:
    for kind in ("llama", "qwen2"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "config.json").write_text(f'{{"model_type": "{kind}"}}')
        save_file({"x.weight": torch.ones(2, 2)}, tmp_path / kind / "model.safetensors")
    assert for_engines(Recipe(str(tmp_path / "llama"), "W4A16g128", engines="mlc")).format == "mlc"
    with pytest.raises(RecipeError, match=r"4-bit asymmetric weights.*that it runs is W4A16g128sym;"):
        for_engines(Recipe(str(tmp_path / "qwen2"), "W4A16g128", engines="mlc"))


@pytest.mark.parametrize(("scheme", "method", "format"), [
    ("W4A4", "rtn", "compressed-tensors"), ("W4A16g32", "rtn", "compressed-tensors"),
    ("W4A16g32ic", "rtn", "bitwright"),
    ("W4A16g32", "easyquant", "compressed-tensors or bitwright"),
])  # fmt: skip
def test_transformers_takes_what_is_decided_later(scheme: str, method: str, format: str, tiny: Checkpoints) -> None:
    recipe = Recipe(str(tiny()), scheme, method, engines="transformers")
    assert api.plan(recipe).format == format
    assert api.plan(replace(recipe, engines=None)).format == format


def test_experts_that_transformers_cannot_load_packed_are_in_our_format(tiny: Checkpoints, tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "moe")
    (tmp_path / "moe" / "tokenizer.json").write_bytes((tiny() / "tokenizer.json").read_bytes())
    recipe = Recipe(str(tmp_path / "moe"), "W4A16g32", "rtn", engines="transformers")
    assert api.plan(recipe).format == "bitwright"
    assert api.plan(replace(recipe, scheme="W4A16g32sym")).format == "compressed-tensors"


def test_what_a_row_says_runs_is_held_by_its_format() -> None:
    for way in (way for engine in api.engines() for way in engine.ways):
        for symmetric, every in ((True, way.symmetric), (False, way.asymmetric)):
            for bits, size in product(every, way.groups or (128,)):
                grid = Grid(bits, symmetric)
                assert find("formats", way.format).holds(grid, Tile(1, size), False), (way.format, grid, size)
                assert not way.channel or find("formats", way.format).holds(grid, Tile(1, FULL), False)
