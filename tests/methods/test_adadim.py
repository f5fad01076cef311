"""AdaDim's claims: per-IC isolates outliers, the chosen axes are never worse than either for all; what is written."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.conftest import Checkpoints
from tests.methods.conftest import divergence
from tests.streamed import Streamed, context_of

import bitwright
from bitwright.core.block import Block
from bitwright.core.decisions import BlockDecisions, LinearDecision
from bitwright.core.errors import RecipeError, SchemeError
from bitwright.core.grid import Tile
from bitwright.core.method import Context
from bitwright.methods import adadim
from bitwright.methods.adadim import AdaDimSettings
from bitwright.steps.apply import parameters_of
from bitwright.steps.trial import rounded
from bitwright.stream.activations import Activations

SCHEME = "W3A16g16"
OC, IC = Tile(1, 16), Tile(16, 1)


def add_outliers(block: Block) -> None:
    """Two channels of what q, k and v read become 64 times as large, the function stays."""
    with torch.no_grad():
        norm = block.module.get_submodule("input_layernorm")
        assert isinstance(norm.weight, torch.Tensor)
        norm.weight[[3, 40]] *= 64
        for name in ("q", "k", "v"):
            block.weight(f"self_attn.{name}_proj")[:, [3, 40]] /= 64


def decided(block: Block, inputs: Activations, axis: str = "auto") -> tuple[BlockDecisions, Context[AdaDimSettings]]:
    context = context_of(block, inputs, SCHEME, AdaDimSettings(axis=axis))
    return adadim.METHOD.decide(block, context, BlockDecisions()), context


def errors(block: Block, context: Context[AdaDimSettings], decisions: BlockDecisions) -> dict[str, float]:
    """Of every group, the error of its enclosing module."""
    assert context.data is not None
    found, parameters = {}, parameters_of(block, BlockDecisions())
    for group in block.topology.groups:
        weights = rounded(parameters, group.linears, context, decisions)
        found[group.enclosing] = context.data.inspect(group.linears, group.enclosing, BlockDecisions(), 2**15).error(
            weights
        )
    return found


def all_with(block: Block, tile: Tile) -> BlockDecisions:
    return BlockDecisions(linears={name: LinearDecision(tile=tile) for name in block.topology.linears})


@pytest.mark.parametrize("outliers", [False, True])
def test_the_choice_is_never_worse_than_either_axis_for_all(streamed: Streamed, block: Block, outliers: bool) -> None:
    if outliers:
        add_outliers(block)
    chosen, context = decided(block, streamed[1])
    mixed, oc, ic = (errors(block, context, d) for d in (chosen, all_with(block, OC), all_with(block, IC)))
    assert mixed.keys() == {group.enclosing for group in block.topology.groups}
    for module, error in mixed.items():
        assert error <= min(oc[module], ic[module]) * (1 + 1e-6), module


def test_per_ic_isolates_outliers(streamed: Streamed, block: Block) -> None:
    """The paper's claim: where an input channel is an outlier, its own groups keep what it does to themselves."""
    add_outliers(block)
    chosen, context = decided(block, streamed[1])
    oc, ic, mixed = (errors(block, context, d)["self_attn"] for d in (all_with(block, OC), all_with(block, IC), chosen))
    assert ic < 0.6 * oc and mixed <= ic * (1 + 1e-6)
    assert any(chosen.linear(f"self_attn.{name}_proj").tile == IC for name in "qkv")


def test_one_axis_for_all_where_it_is_asked_for(streamed: Streamed, block: Block) -> None:
    for axis, tile in (("oc", None), ("ic", IC)):
        found, _ = decided(block, streamed[1], axis)
        assert {found.linear(name).tile for name in block.topology.linears} == {tile}


def test_what_does_not_divide_stays_and_says_so(streamed: Streamed, block: Block) -> None:
    context = context_of(block, streamed[1], "W3A16g64", AdaDimSettings())  # k and v have 32 outputs
    found = adadim.METHOD.decide(block, context, BlockDecisions())
    assert [text.partition(":")[0] for text in found.fallbacks] == ["self_attn.k_proj", "self_attn.v_proj"]
    assert found.linear("self_attn.k_proj").tile is None


@pytest.fixture(scope="module")
def recipe(tiny: Checkpoints, text: str) -> bitwright.Recipe:
    return bitwright.Recipe(
        model=str(tiny()), scheme="W2A16g16", calibration=text, samples=8, seqlen=64, method="adadim+gptq"
    )


def test_with_gptq_it_is_written_mixed_and_better_than_rounding(recipe: bitwright.Recipe, tmp_path: Path) -> None:
    rounding = divergence(replace(recipe, method="adadim"), tmp_path / "adadim")
    assert divergence(recipe, tmp_path / "gptq") < 0.8 * rounding
    account = json.loads((tmp_path / "gptq" / "bitwright.json").read_text())
    tiles = {tuple(linear["tile"]) for report in account["blocks"] for linear in report["linears"]}
    assert tiles == {(1, 16), (16, 1)} and account["format"] == "bitwright"
    shown = bitwright.inspect(tmp_path / "gptq").linears
    assert {(row.name, row.tile) for row in shown if row.tile is not None} == {
        (linear["name"], tuple(linear["tile"])) for report in account["blocks"] for linear in report["linears"]
    }


def test_learned_ranges_on_per_ic_tiles(recipe: bitwright.Recipe, tmp_path: Path) -> None:
    fixed = recipe.changed(axis="ic", method="adadim+lwc")
    learned = divergence(fixed, tmp_path / "lwc")
    assert learned < 0.8 * divergence(replace(fixed, method="adadim"), tmp_path / "adadim")


def test_what_cannot_be_is_said_at_the_start(recipe: bitwright.Recipe) -> None:
    with pytest.raises(RecipeError, match="cannot hold groups along the output"):
        bitwright.plan(replace(recipe, format="compressed-tensors"))
    assert bitwright.plan(recipe.changed(format="compressed-tensors", axis="oc")).format == "compressed-tensors"
    with pytest.raises(SchemeError, match="fixes the axis"):
        bitwright.plan(replace(recipe, scheme="W2A16g16ic"))
    with pytest.raises(SchemeError, match="32 output features do not divide into groups of 64"):
        bitwright.plan(recipe.changed(scheme="W2A16g64", axis="ic"))
    with pytest.raises(RecipeError, match="there is no axis 'co'; did you mean oc"):
        bitwright.plan(recipe.changed(axis="co"))
    with pytest.raises(RecipeError, match="adadim learns from calibration data"):
        bitwright.plan(replace(recipe, method="adadim", calibration=None))
    with pytest.raises(RecipeError, match="gptq has no use for axis"):
        bitwright.plan(recipe.changed(method="gptq", axis="ic"))
