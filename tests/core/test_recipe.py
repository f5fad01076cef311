import contextlib
import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import bitwright
from bitwright.core.errors import RecipeError, UserError
from bitwright.core.recipe import Recipe
from bitwright.core.settings import known_settings

LEAST: dict[str, Any] = {"model": "m", "scheme": "W4A16"}
KEYS = (
    *("model", "scheme", "method", "format", "calibration", "text_field", "all_experts", "samples", "seqlen", "seed"),
    *(
        "quantize_lm_head",
        "shard_size",
        "training",
        "epochs",
        "batch_size",
        "lwc_lr",
        "let_lr",
        "aug_loss",
        "alpha",
        "schedule",
    ),
    *("precision", "sites", "refine", "drift", "axis", "damping", "act_order", "outliers", "range", "norm"),
    *(
        "alignment",
        "include",
        "exclude",
        "scheme_for",
        "allocation",
        "load_parameters",
        "engines",
        "embeddings",
        "base",
    ),
)
"""What bitwright.json has said of a recipe since version 0.1, in this order."""


def test_the_least_a_recipe_says() -> None:
    recipe = Recipe.from_mapping(LEAST)
    assert recipe == Recipe(model="m", scheme="W4A16")
    assert (recipe.method, recipe.format, recipe.calibration) == (None, None, None)
    assert (recipe.samples, recipe.seqlen, recipe.seed, recipe.quantize_lm_head) == (128, None, 0, False)
    assert (recipe.training, recipe.load_parameters) == ("bitwright", None)
    assert recipe.settings == {} and recipe.epochs is None


def test_settings_are_those_that_were_asked_for() -> None:
    """By the names that methods have for them; ``seed`` is the recipe's own."""
    asked = {
        "epochs": 3,
        "batch-size": 2,
        "lwc-lr": 1,
        "let-lr": 0.5,
        "aug-loss": False,
        "alpha": 0,
        "refine": False,
        "drift": True,
        "damping": "1e-2",
        "act-order": False,
        "outliers": 3,
        "range": "paper",
        "norm": 1.5,
        "alignment": 4,
    }
    asked |= {"schedule": "constant", "precision": "float32", "sites": "all", "axis": "ic"}
    recipe = Recipe.from_mapping(LEAST | asked)
    assert recipe.settings == {
        "epochs": 3,
        "batch_size": 2,
        "lwc_lr": 1,
        "let_lr": 0.5,
        "aug_loss": False,
        "alpha": 0,
        "schedule": "constant",
        "precision": "float32",
        "sites": "all",
        "refine": False,
        "drift": True,
        "axis": "ic",
        "damping": 0.01,
        "act_order": False,
        "outliers": "3",
        "range": "paper",
        "norm": 1.5,
        "alignment": 4,
    }
    assert set(recipe.settings) == set(known_settings())
    assert (recipe.epochs, recipe.outliers) == (3, "3")


def test_a_number_may_be_written_as_yaml_reads_no_number() -> None:
    assert Recipe.from_mapping(LEAST | {"lwc-lr": "1e-2"}).lwc_lr == 0.01
    with pytest.raises(RecipeError, match="recipe key 'lwc_lr' is 'fast'; it takes float or nothing"):
        Recipe.from_mapping(LEAST | {"lwc-lr": "fast"})


def test_keys_may_be_written_with_hyphens() -> None:
    written = LEAST | {"quantize-lm-head": True, "shard-size": "1GB"}
    assert Recipe.from_mapping(written) == Recipe(model="m", scheme="W4A16", quantize_lm_head=True, shard_size="1GB")


def test_a_recipe_survives_as_plain_values() -> None:
    settings: dict[str, Any] = {
        "epochs": 5,
        "batch_size": 2,
        "lwc_lr": 0.1,
        "let_lr": 0.2,
        "aug_loss": True,
        "alpha": 0.75,
    }
    settings |= {"schedule": "cosine", "precision": "bfloat16", "sites": "all", "refine": False, "drift": False}
    settings |= {"axis": "oc", "damping": 0.1, "act_order": False, "outliers": "0.5%", "range": "fitted"}
    settings |= {"norm": 3.0, "alignment": 2.0}
    recipe = Recipe("m", "W2A16g64", "rtn", "dense", "t.txt", 3, 64, 7, True, "12MB", "paper", **settings)
    recipe = replace(recipe, include="a", exclude="b", scheme_for={"c": "W8A16"}, allocation="a.json")
    recipe = replace(recipe, load_parameters="p.safetensors", text_field="body", all_experts=True)
    recipe = replace(recipe, engines="vllm", embeddings="f16", base="b.gguf")
    plain, least = Recipe("", "W4A16").as_dict(), recipe.as_dict()
    assert all(plain[key] != least[key] for key in Recipe.keys())  # noqa: SIM118
    assert Recipe.from_mapping(recipe.as_dict()) == recipe
    assert hash(Recipe.from_mapping(recipe.as_dict())) == hash(recipe)
    assert pickle.loads(pickle.dumps(recipe)) == copy.deepcopy(recipe) == recipe
    assert tuple(recipe.as_dict()) == Recipe.keys() == KEYS


def test_one_setting_is_replaced() -> None:
    recipe = Recipe("m", "W4A16", epochs=3, alpha=0.25)
    other = recipe.changed(epochs=None, scheme="W3A16")
    assert (recipe.epochs, other.epochs, other.alpha, other.scheme) == (3, None, 0.25, "W3A16")
    assert other == Recipe("m", "W3A16", alpha=0.25) != recipe


@pytest.mark.parametrize("make", [Recipe, lambda **keys: replace(Recipe("m", "W4A16"), **keys)])
def test_python_refuses_an_unknown_key_as_yaml_does(make: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match="a recipe has no key 'epoch'; did you mean epochs"):
        make(**(LEAST | {"epoch": 1}))
    with pytest.raises(AttributeError, match="a recipe has no key 'epoch'; did you mean epochs"):
        _ = Recipe("m", "W4A16").epoch


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("sheme", "scheme"),
        ("bits", None),
        ("Model", "model"),
        ("seq-len", "seqlen"),
        ("seeds", "seed"),
        ("epoch", "epochs"),
        ("lwc-rate", "lwc_lr"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(key: str, nearest: str | None) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.from_mapping(LEAST | {key: 1})
    assert f"a recipe has no key '{key.replace('-', '_')}'; " in str(error.value)
    assert nearest is None or f"did you mean {nearest}?" in str(error.value)
    known = str(error.value).partition("Known: ")[2].split(", ")
    assert known == sorted(KEYS)


@pytest.mark.parametrize("key", ["model", "scheme"])
@pytest.mark.parametrize("missing", [{}, None])
def test_model_and_scheme_must_be_said(key: str, missing: Any) -> None:
    mapping = {k: v for k, v in LEAST.items() if k != key} | ({key: None} if missing is None else {})
    with pytest.raises(RecipeError, match=f"does not say which {key}: give --{key}"):
        Recipe.from_mapping(mapping)


@pytest.mark.parametrize(
    ("key", "value", "takes"),
    [
        ("model", 3, "str"),
        ("scheme", 4, "str or nothing"),
        ("method", ["rtn"], "str or nothing"),
        ("samples", "128", "int"),
        ("samples", True, "int"),
        ("samples", 1.5, "int"),
        ("seqlen", "2048", "int or nothing"),
        ("seqlen", False, "int or nothing"),
        ("seed", None, "int"),
        ("quantize_lm_head", 1, "bool"),
        ("quantize_lm_head", "yes", "bool"),
        ("shard_size", 5_000_000, "str"),
        ("calibration", 1, "str or nothing"),
        ("training", None, "str"),
        ("epochs", 2.0, "int or nothing"),
        ("epochs", True, "int or nothing"),
        ("batch_size", "1", "int or nothing"),
        ("lwc_lr", "fast", "float or nothing"),
        ("let_lr", True, "float or nothing"),
        ("alpha", [0.5], "float or nothing"),
        ("aug_loss", 1, "bool or nothing"),
        ("aug_loss", "no", "bool or nothing"),
        ("schedule", 1, "str or nothing"),
        ("sites", ["all"], "str or nothing"),
        ("load_parameters", True, "str or nothing"),
    ],
)
def test_a_value_of_another_kind_is_refused(key: str, value: Any, takes: str) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.from_mapping(LEAST | {key: value})
    assert str(error.value) == f"recipe key '{key}' is {value!r}; it takes {takes}"


@pytest.mark.parametrize(("key", "value", "least"), [("samples", 0, 1), ("seqlen", 0, 1), ("seed", -1, 0)])
def test_a_number_below_its_least_is_refused(key: str, value: int, least: int) -> None:
    with pytest.raises(RecipeError, match=f"{key} is {value}; it must be at least {least}"):
        Recipe.from_mapping(LEAST | {key: value})


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("500mb", 500 * 10**6),
        (" 1.5 GB ", 1_500_000_000),
        ("100kb", 100_000),
        ("0.001KB", 1),
        ("2tb", 2 * 10**12),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert Recipe(model="m", scheme="W4A16", shard_size=text).shard_bytes == size


@pytest.mark.parametrize("text", ["", "5", "GB", "5GiB", "-5GB", "0GB", "0.0MB", "5 G B", "5,5GB", "1e9KB", "\u0665GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(RecipeError, match="is no size; write a number and a unit"):
        Recipe(model="m", scheme="W4A16", shard_size=text)


@given(st.text())
def test_any_size_is_read_or_refused(text: str) -> None:
    try:
        assert Recipe(model="m", scheme="W4A16", shard_size=text).shard_bytes > 0
    except RecipeError as error:
        assert "is no size" in str(error)


@given(st.dictionaries(st.text() | st.sampled_from(KEYS), st.none() | st.integers()))
def test_any_mapping_is_read_or_refused(mapping: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):  # no integer is a model
        Recipe.from_mapping(mapping)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "awqq"}, "there is no method 'awqq'; did you mean awq"),
        ({"method": "gptq+gptq"}, "both decide the"),
        ({"scheme": "W4"}, "'W4' is no scheme"),
        ({"scheme_for": "*.down_proj=W99A16"}, "asks for weights of 99 bits"),
        ({"scheme_for": "*.down_proj"}, "is no PATTERN=SCHEME"),
        ({"format": "ggfu"}, "there is no format 'ggfu'; did you mean gguf"),
        ({"engines": ["vlm"]}, "there is no engine 'vlm'; did you mean vllm"),
        ({"training": "papers"}, "there are no training settings 'papers'; did you mean paper"),
        ({"samples": 10**5000}, "samples is a huge int; it must be less than"),
    ],
)
def test_what_is_not_known_is_refused_when_the_recipe_is_made(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Recipe(**({"model": "m", "scheme": "W4A16g128"} | wrong))


@pytest.mark.parametrize("value", [3, 1.5, True, b"x", ["x", 3], {"x": 3}, ..., float("nan")], ids=repr)
@pytest.mark.parametrize("key", Recipe.keys())
def test_a_value_of_a_wrong_type_is_a_recipe_error_or_taken(key: str, value: Any) -> None:
    with contextlib.suppress(UserError):
        Recipe(**({"model": "m", "scheme": "W4A16g128"} | {key: value}))


def test_paths_are_taken_as_they_are() -> None:
    places = ("model", "calibration", "allocation", "load_parameters", "base")
    paths: dict[str, Any] = {key: Path(f"some/{key}") for key in places}
    recipe = Recipe(scheme="W4A16g128", **paths)
    assert [getattr(recipe, key) for key in places] == [f"some/{key}" for key in places]


def test_a_path_in_place_of_a_recipe_is_refused_with_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"write bitwright.quantize\(bitwright.Recipe\(model='/nope', scheme="):
        bitwright.quantize("/nope", tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="found 3; write"):
        bitwright.plan(3)  # type: ignore[arg-type]
