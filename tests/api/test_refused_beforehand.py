"""What can be told from config.json, scheme and shapes is refused before any work, by quantize and by export."""

from pathlib import Path

import pytest
from tests.conftest import Checkpoints
from tests.plugin.experts import save_original

import bitwright
from bitwright.core.errors import RecipeError
from bitwright.core.recipe import Recipe


@pytest.fixture(scope="module")
def of_experts(tiny: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models by name: Mixtral has its experts one by one, GptOss fused in one tensor."""
    found = {}
    for name in ("Mixtral", "GptOss"):
        found[name] = tmp_path_factory.mktemp("experts") / name
        save_original(name, found[name])
        (found[name] / "tokenizer.json").write_bytes((tiny() / "tokenizer.json").read_bytes())
    return found


@pytest.mark.parametrize(("format", "says"), [
    ("gptq", r"gate_proj \[76, 64\]: 76 output features are no multiple of 32"),
    ("awq", r"gate_proj \[76, 64\]: 76 output features are no multiple of 8"),
])  # fmt: skip
def test_sizes_that_a_format_does_not_pack(format: str, says: str, tiny: Checkpoints, tmp_path: Path) -> None:
    model = str(tiny("float16", intermediate_size=76))
    with pytest.raises(RecipeError, match=f"{says}.*--exclude 'model.layers.0.mlp.gate_proj'"):
        bitwright.plan(Recipe(model, "W4A16", "rtn", format))
    with pytest.raises(RecipeError, match=says) as error:
        bitwright.plan(Recipe(model, "W4A16", "gptq", format, calibration="builtin", seqlen=32, samples=2))
    assert "--exclude" not in str(error.value)
    left = Recipe(model, "W4A16", "rtn", format, exclude="*.gate_proj,*.up_proj,*.down_proj")
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


def test_an_export_of_activations_is_refused_before_anything_is_written(tiny: Checkpoints, tmp_path: Path) -> None:
    bitwright.quantize(Recipe(str(tiny()), "W4A8", "rtn"), tmp_path / "folder")
    with pytest.raises(RecipeError, match="format gptq cannot hold the activations or KV cache of scheme W4A8"):
        bitwright.export(tmp_path / "folder", tmp_path / "out", format="gptq")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
