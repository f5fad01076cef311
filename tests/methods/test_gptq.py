"""GPTQ on tiny models: the written folder, compositions, and what it says."""

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.conftest import Checkpoints
from tests.methods.conftest import divergence

import bitwright
from bitwright.core.errors import RecipeError
from bitwright.methods import compose


@pytest.fixture(scope="module")
def recipe(tiny: Checkpoints, text: str) -> bitwright.Recipe:
    return bitwright.Recipe(model=str(tiny()), scheme="W3A16g32", calibration=text, samples=8, seqlen=64, method="gptq")


@pytest.mark.parametrize("scheme", ["W3A16", "W2A16g32", "W4A16g16sym", "W4A4"])
def test_better_than_rounding_to_nearest(scheme: str, recipe: bitwright.Recipe, tmp_path: Path) -> None:
    rtn, gptq = (
        divergence(replace(recipe, scheme=scheme, method=method), tmp_path / method) for method in ("rtn", "gptq")
    )
    assert gptq < (0.95 if scheme == "W4A4" else 0.7) * rtn


@pytest.mark.parametrize("method", ["lwc+gptq", "let+gptq", "let+lwc+gptq"])
def test_composed_it_is_better_than_without(method: str, recipe: bitwright.Recipe, tmp_path: Path) -> None:
    asked = recipe.changed(scheme="W2A16g32", sites="all" if "let" in method else None, epochs=1)
    alone = divergence(replace(asked, method=method.removesuffix("+gptq")), tmp_path / "alone")
    assert divergence(replace(asked, method=method), tmp_path / "composed") < alone


def test_the_papers_own_differs_by_the_drift_alone(recipe: bitwright.Recipe, tmp_path: Path) -> None:
    """Nothing is quantized before the first linears, so their codes are the same; later ones are not."""
    plain = replace(recipe, training="paper")
    for name, asked in (("plain", plain), ("ours", recipe)):
        bitwright.quantize(asked, tmp_path / name)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "ours"))
    same = {name for name in first if name.endswith("packed") and first[name].equal(second[name])}
    assert same == {f"model.layers.0.self_attn.{p}_proj.weight_packed" for p in "qkv"}


@pytest.mark.parametrize(
    ("methods", "says"),
    [
        ("gptq+lwc", r"write lwc\+gptq$"),
        ("gptq+let", r"write let\+gptq$"),
        ("rtn+gptq", "rtn and gptq both decide the rounding"),
        ("gptq+gptq", "gptq and gptq both decide the rounding"),
    ],
)
def test_orders_that_cannot_work_are_refused(methods: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        compose(methods)


def test_the_output_layer_is_rounded_to_nearest_and_it_says_so(recipe: bitwright.Recipe, tmp_path: Path) -> None:
    asked = replace(recipe, quantize_lm_head=True)
    assert any("the output layer gets min-max ranges" in note for note in bitwright.plan(asked).notes)
    bitwright.quantize(asked, tmp_path / "gptq")
    bitwright.quantize(replace(asked, method="rtn"), tmp_path / "rtn")
    gptq, rtn = (load_file(tmp_path / name / "model.safetensors") for name in ("gptq", "rtn"))
    assert gptq["lm_head.weight_packed"].equal(rtn["lm_head.weight_packed"])


def test_text_is_asked_for(recipe: bitwright.Recipe) -> None:
    with pytest.raises(RecipeError, match="gptq learns from calibration data"):
        bitwright.plan(replace(recipe, calibration=None))
