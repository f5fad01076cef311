"""What engines run is asked before any work; the nearest scheme that is named does run."""

import re
from pathlib import Path

import pytest

import bitwright
from bitwright import api
from bitwright.api.engine_table import ENGINES, for_engines
from bitwright.core.errors import RecipeError
from bitwright.core.recipe import Recipe
from bitwright.core.registry import names

from ..conftest import Checkpoints


def test_every_row_is_of_a_format_and_says_how_it_was_checked() -> None:
    for engine in api.engines():
        assert {way.format for way in engine.ways} <= set(names("formats"))
        assert all(re.search(r"\d+\.\d+", way.checked) for way in engine.ways)


@pytest.mark.parametrize(("scheme", "engines", "format"), [
    ("W4A16g128", "vllm", "compressed-tensors"), ("W4A16g32", "llama.cpp", "gguf"), ("W3A16g128", "gptqmodel", "gptq"),
    ("W4A16g128", "vllm, gptqmodel", "awq"), ("W4A16g32ic", "transformers", "bitwright"), ("mlc:q3f16_1", "mlc", "mlc"),
    ("W4A4", "transformers", "compressed-tensors"),
])  # fmt: skip
def test_the_format_is_chosen(scheme: str, engines: str, format: str, tiny: Checkpoints) -> None:
    assert for_engines(Recipe(str(tiny()), scheme, "rtn", engines=engines)).format == format


@pytest.mark.parametrize(("scheme", "engine", "nearest"), [
    ("W4A16g128ic", "llama.cpp", "W4A16g128"), ("W3A16", "vllm", "W4A16"), ("W4A4", "llama.cpp", "W4A16"),
    ("W5A16g64", "gptqmodel", "W4A16g64"), ("W2A16g64ic", "mlc", "W2A16g64"),
])  # fmt: skip
def test_what_does_not_run_is_refused_with_the_nearest_that_does(
    scheme: str, engine: str, nearest: str, tiny: Checkpoints, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as error:
        bitwright.quantize(Recipe(str(tiny()), scheme, "rtn", engines=engine), tmp_path / "out")
    found = re.search(r"nearest scheme that it runs is (\S+);", str(error.value))
    assert found is not None and not any(tmp_path.iterdir())
    assert for_engines(Recipe(str(tiny()), found[1], "rtn", engines=engine)).format
    if engine != "mlc":
        assert found[1] == nearest


@pytest.mark.parametrize(("how", "says"), [
    ({"engines": "llamacpp"}, "there is no engine 'llamacpp'; did you mean llama.cpp"),
    ({"engines": "llama.cpp", "method": "easyquant"}, r"outliers \(--outliers 0 keeps none\)"),
    ({"engines": "llama.cpp", "format": "gptq"}, "does not load format gptq; it loads gguf"),
    ({"engines": "llama.cpp,vllm"}, r"no one format .*llama\.cpp gguf; vllm compressed-tensors.*bitwright export"),
])  # fmt: skip
def test_refused(how: dict[str, str], says: str, tiny: Checkpoints) -> None:
    recipe = Recipe(str(tiny()), "W4A16g32", **({"method": "rtn"} | how))  # type: ignore[arg-type]
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


def test_outliers_may_be_left_out(tiny: Checkpoints) -> None:
    recipe = Recipe(str(tiny()), "W4A16g32", "easyquant", engines="llama.cpp", outliers="0")
    assert for_engines(recipe).format == "gguf" and len(ENGINES) == 5
