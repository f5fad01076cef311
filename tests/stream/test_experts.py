"""Experts: few tokens, all tokens, and one tile for those in one parameter."""

from pathlib import Path

import pytest
import torch
from tests.conftest import save_tokenizer
from tests.stream.test_architectures import KINDS
from tests.tiny_models import config_of, saved

import bitwright
from bitwright.core.errors import RecipeError
from bitwright.core.recipe import Recipe
from bitwright.formats import QuantizedFolder


def model_of(kind: str, folder: Path, **changes: object) -> Path:
    path, model = saved(config_of(kind, **KINDS[kind] | changes), folder / kind)
    model.bfloat16().save_pretrained(path)
    save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_of("mixtral", tmp_path_factory.mktemp("experts"))


def test_experts_with_few_tokens_are_named(mixtral: Path, tmp_path: Path) -> None:
    """32 tokens go to two of four experts each: some of them get fewer than 32."""
    few = bitwright.quantize(Recipe(str(mixtral), "W4A16g32", "gptq", None, "builtin", 1, 32), tmp_path / "few")
    named = [words for words in few.fallbacks if "tokens reached it, rounded to nearest" in words]
    assert named and all("experts" in words for words in named)
    every = Recipe(str(mixtral), "W4A16g32", "gptq", None, "builtin", 1, 32, all_experts=True)
    result = bitwright.quantize(every, tmp_path / "all")
    assert not any("tokens reached it" in words for words in result.fallbacks)
    assert result.output_error is not None and few.output_error is not None
    assert result.output_error < few.output_error


def test_the_model_itself_is_not_changed_by_all_experts(mixtral: Path, tmp_path: Path) -> None:
    """RTN looks at no statistics, so the streams, and the errors that are measured on them, stay what they are."""
    recipes = [
        Recipe(str(mixtral), "W4A16g32", "rtn", None, "builtin", 2, 32, all_experts=both) for both in (False, True)
    ]
    ours, theirs = (bitwright.quantize(recipe, tmp_path / str(n)) for n, recipe in enumerate(recipes))
    assert ours.output_error == theirs.output_error


def test_experts_in_one_parameter_have_one_tile(tmp_path: Path) -> None:
    """AdaDim chooses an axis for each expert; what is stored as one tensor has that of most."""
    model = model_of("gpt_oss", tmp_path)
    recipe = Recipe(str(model), "W4A16g32", "adadim+gptq", None, "builtin", 4, 32)
    bitwright.quantize(recipe, tmp_path / "out")
    folder = QuantizedFolder.open(tmp_path / "out")
    assert folder.stacks
    for stack in folder.stacks:
        assert len({part.tile for part in folder.slices(stack)}) == 1
    assert bitwright.verify(tmp_path / "out", model).passed


def test_a_router_that_cannot_choose_all_is_refused(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.mixtral import modeling_mixtral

    forward = modeling_mixtral.MixtralTopKRouter.forward

    def strict(self: object, hidden_states: object) -> object:
        chosen: tuple[torch.Tensor, ...] = forward(self, hidden_states)  # type: ignore[no-untyped-call, arg-type]
        if chosen[-1].shape[-1] > 2:
            raise RuntimeError("two are the most")
        return chosen

    monkeypatch.setattr(modeling_mixtral.MixtralTopKRouter, "forward", strict)
    recipe = Recipe(str(mixtral), "W4A16g32", "gptq", None, "builtin", 1, 32, all_experts=True)
    with pytest.raises(RecipeError, match=r"cannot choose all experts.*two are the most.*leave --all-experts out"):
        bitwright.quantize(recipe, tmp_path / "out")
