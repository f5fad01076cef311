"""Exports of models whose linears have one group per row, or several, side by side."""

import json
from pathlib import Path

import pytest
import torch
from tests.conftest import Checkpoints

import bitwright
from bitwright.core.errors import RecipeError
from bitwright.core.recipe import Recipe
from bitwright.formats import QuantizedFolder

FORMATS = ("bitwright", "compressed-tensors", "gptq", "awq")


@pytest.mark.parametrize("source", FORMATS)
def test_a_group_that_is_the_whole_row_beside_rows_of_three(source: str, tiny: Checkpoints, tmp_path: Path) -> None:
    """Groups of 64, 64 input features for most linears and 192 for down: the config says 64 for all."""
    model = str(tiny(num_key_value_heads=4))
    bitwright.quantize(Recipe(model, "W4A16g64", "rtn", source), tmp_path / "first")
    before = QuantizedFolder.open(tmp_path / "first")
    for format in ("gptq", "awq"):
        if format == source:
            continue
        exported = bitwright.export(tmp_path / "first", tmp_path / format, format=format)
        assert exported.exact == exported.linears == 14
        config = json.loads((tmp_path / format / "config.json").read_text())["quantization_config"]
        assert config["group_size"] == 64 and "dynamic" not in config
        after = QuantizedFolder.open(tmp_path / format)
        assert all(torch.equal(before.read(name).codes, after.read(name).codes) for name in before.linears)


def test_one_scale_per_row_is_repeated_where_all_groups_have_one_size(tiny: Checkpoints, tmp_path: Path) -> None:
    recipe = Recipe(str(tiny()), "W4A16g32", "rtn", "bitwright", scheme_for="*.down_proj,*.o_proj=W4A16")
    bitwright.quantize(recipe, tmp_path / "first")
    exported = bitwright.export(tmp_path / "first", tmp_path / "out", format="awq")
    assert exported.exact == exported.linears == 14
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["group_size"] == 32
    assert bitwright.verify(tmp_path / "out", recipe.model).passed


@pytest.mark.parametrize("lossy", [False, True])
def test_groups_that_awq_cannot_bring_to_one_size(lossy: bool, tiny: Checkpoints, tmp_path: Path) -> None:
    recipe = Recipe(str(tiny()), "W4A16g64", "rtn", "bitwright", scheme_for="*.1.self_attn.o_proj=W4A16g32")
    bitwright.quantize(recipe, tmp_path / "first")
    says = r"layers\.1\.self_attn\.o_proj: in groups of 32, where most linears have groups of 64; format awq has one"
    with pytest.raises(RecipeError, match=says):
        bitwright.export(tmp_path / "first", tmp_path / "out", format="awq", lossy=lossy)
    assert [path.name for path in tmp_path.iterdir()] == ["first"]
    exported = bitwright.export(tmp_path / "first", tmp_path / "out", format="gptq")
    assert exported.exact == exported.linears == 14
