"""EasyQuant: what is kept is exact, what is not loses less, and others go on from there."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tests.conftest import Checkpoints, changed
from tests.streamed import Streamed, context_of, decided_alone

import bitwright
from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.block import Block
from bitwright.core.decisions import BlockDecisions, LinearDecision
from bitwright.core.errors import RecipeError, UserError
from bitwright.core.grid import Tile
from bitwright.core.outlier_rule import OutlierRule
from bitwright.core.qtensor import QTensor
from bitwright.core.quantized import Described
from bitwright.core.scheme import Scheme
from bitwright.formats.bitwright import read
from bitwright.methods import gptq, lwc
from bitwright.methods.gptq import GPTQSettings
from bitwright.methods.lwc import LWCSettings
from bitwright.steps.apply import quantize_linear, weights_of
from bitwright.steps.outliers import bounds, outliers
from bitwright.steps.range_fit import fitted
from bitwright.steps.rounding import Ranges, compensated, curvature


def rows_of(output: str) -> list[dict[str, Any]]:
    report = json.loads((Path(output) / "bitwright.json").read_text())
    return [row for block in report["blocks"] for row in block["linears"]]


def decided(weight: torch.Tensor, scheme: str, axis: str) -> tuple[LinearDecision, QTensor]:
    found = decided_alone("easyquant", weight, scheme, axis=axis, outliers="0", alignment=0.0)
    return found, quantize_linear(weight, found, Scheme.parse(scheme), torch.float32)


@pytest.mark.parametrize("scheme", ["W4A16", "W3A16g32", "W4A16sym", "W2A16g32ic"])
def test_outliers_are_written_exactly_and_few(tiny: Checkpoints, tmp_path: Path, scheme: str) -> None:
    source = tiny("bfloat16")
    result = bitwright.quantize(bitwright.Recipe(str(source), scheme, "easyquant"), tmp_path / "out")
    assert result.format == "bitwright"
    original, parsed = Checkpoint.open(source), Scheme.parse(scheme)
    rows = rows_of(result.output)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for row in rows:
        name = str(row["name"])
        weight, written = original.read(f"{name}.weight"), read(tensors, name, Described(parsed.weight))
        expected = outliers(weight.float(), bounds([weight].copy, OutlierRule(3.0)))
        count = 0 if expected is None else int(expected.sum())
        assert row["outliers"] == count <= 0.01 * weight.numel()
        if expected is not None:
            assert torch.equal(written.dequantize()[expected], weight[expected])
    assert sum(row["outliers"] for row in rows) > 0


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_outliers_are_exact_in_a_checkpoint_of_several_dtypes(
    dtype: torch.dtype, tiny: Checkpoints, tmp_path: Path
) -> None:
    """Of most linears the dtype is another, and too narrow for the values of one."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"].to(dtype) * (1 + 2**-9)

    model = changed(tiny("bfloat16"), tmp_path / "model", change)
    out = bitwright.quantize(bitwright.Recipe(str(model), "W4A16g32", "easyquant"), tmp_path / "out").output
    written, original = load_file(Path(out, "model.safetensors")), load_file(model / "model.safetensors")
    index, value = written[f"{UP}.outlier_index"].long(), written[f"{UP}.outlier_value"]
    assert len(index) and value.dtype == torch.float32
    assert torch.equal(value, original[f"{UP}.weight"].flatten()[index].float())


@pytest.mark.parametrize("by_blocks", [False, True])
def test_weights_beyond_the_scales_dtype_are_refused(
    by_blocks: bool, tiny: Checkpoints, text: str, tmp_path: Path
) -> None:
    model = changed(tiny("bfloat16"), tmp_path / "model", lambda tensors: tensors[f"{UP}.weight"].mul_(2**26))
    recipe = bitwright.Recipe(str(model), "W4A16g32", "rtn", "gptq")
    if by_blocks:
        recipe = replace(recipe, calibration=text, samples=2, seqlen=32)
    with pytest.raises(RecipeError, match=rf"{UP}: has weights of \S+, and float16, .* ends at 6\.55e\+04.*--format"):
        bitwright.quantize(recipe, tmp_path / "out")


def test_linears_of_which_little_is_left_are_named(tiny: Checkpoints, tmp_path: Path) -> None:
    model = changed(tiny("bfloat16"), tmp_path / "model", lambda tensors: tensors[f"{UP}.weight"].mul_(2**-40))
    recipe = bitwright.Recipe(str(model), "W4A16g32", "rtn", "gptq")
    (note,) = bitwright.quantize(recipe, tmp_path / "out").notes
    assert note.startswith(f"of 1 linears more than half is lost, by squared error; the most of {UP}: 1")
    assert note.endswith("a --format that stores scales in the checkpoint's dtype (bitwright, compressed-tensors)")


def test_plain_transformers_loads_it_where_no_outlier_is_kept(tiny: Checkpoints, tmp_path: Path) -> None:
    recipe = bitwright.Recipe(str(tiny("bfloat16")), "W4A16g32", "easyquant", outliers="0")
    result = bitwright.quantize(recipe, tmp_path / "out")
    assert result.format == "compressed-tensors"
    assert [row["outliers"] for row in rows_of(result.output)] == [0] * 14


@pytest.mark.parametrize("kept", ["0", "3"])
@pytest.mark.parametrize("scheme", ["W4A16", "W3A16g32", "W2A16g32"])
def test_every_linear_loses_less_than_rounded_to_nearest(
    tiny: Checkpoints, tmp_path: Path, scheme: str, kept: str
) -> None:
    plain = bitwright.Recipe(str(tiny("bfloat16")), scheme, "rtn")
    ours = plain.changed(method="easyquant", outliers=kept, alignment=0.0)
    errors = []
    for name, recipe in (("rtn", plain), ("easyquant", ours)):
        rows = rows_of(bitwright.quantize(recipe, tmp_path / name).output)
        errors.append([float(row["weight_error"]) for row in rows])
    assert len(errors[0]) == 2 * 7
    assert all(easyquant < rtn for rtn, easyquant in zip(*errors, strict=True))


def test_the_axis_is_the_one_that_loses_less() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    weight *= 2.0 ** (torch.arange(64) % 6)
    found = {axis: decided(weight, "W3A16g32", axis) for axis in ("oc", "ic", "auto")}
    errors = {axis: float((q.dequantize() - weight).square().sum()) for axis, (_, q) in found.items()}
    assert errors["auto"] == errors["ic"] < errors["oc"]
    assert found["auto"][0].tile == Tile(32, 1)
    assert decided(weight.T, "W3A16g32", "auto")[0].tile == Tile(1, 32)


def test_gptq_rounds_around_outliers(streamed: Streamed, block: Block) -> None:
    """Against GPTQ in its plainest form, a column at a time and every later column updated at once."""
    _, stream = streamed
    context = context_of(block, stream, "W3A16g32", GPTQSettings(act_order=False, drift=False))
    scheme = context.allocation.default
    weights = weights_of(block, BlockDecisions())
    decisions = BlockDecisions(linears={n: decided_alone("easyquant-outliers", w, scheme) for n, w in weights.items()})
    after = gptq.decide(block, context, decisions)
    name = block.topology.groups[0].linears[0]
    weight, kept, one = block.weight(name).float(), decisions.linear(name).outliers, after.linear(name)
    assert kept is not None and one.low is not None and one.high is not None
    assert context.data is not None
    found = curvature(context.data.moments(name, decisions, drift=False).inputs, damping=0.01, act_order=False)
    left, expected = weight.clone(), torch.zeros_like(weight)
    for j in range(weight.shape[1]):
        codes = quantize_linear(
            left.masked_fill(kept, 0),
            LinearDecision(low=one.low, high=one.high),
            scheme,
            torch.float32,
        )
        expected[:, j] = torch.where(kept[:, j], weight[:, j], codes.dequantize()[:, j])
        error = (left[:, j] - expected[:, j]) / found.factor[j, j]
        left[:, j + 1 :] -= error[:, None] * found.factor[j, j + 1 :]
    written = quantize_linear(weight, one, scheme, torch.float32)
    assert torch.equal(written.dequantize()[kept], weight[kept])
    assert (written.dequantize() - expected).abs().max() < 1e-5


def test_moving_errors_on_past_outliers_pays(streamed: Streamed, block: Block) -> None:
    _, stream = streamed
    context = context_of(block, stream, "W2A16g32", GPTQSettings())
    scheme = context.allocation.default
    assert context.data is not None
    name = block.topology.groups[0].linears[0]
    weight = block.weight(name).float()
    hessian = context.data.moments(name, BlockDecisions(), drift=False).inputs
    one = decided_alone("easyquant-outliers", weight, scheme)
    ranges = Ranges(one.inside(weight), None, scheme.weight, scheme.tile, torch.float32)
    assert one.outliers is not None
    codes = compensated(weight, ranges, curvature(hessian), (one.outliers, weight))
    lost = []
    for decision in (one, LinearDecision(low=ranges.low, high=ranges.high, outliers=one.outliers, codes=codes)):
        off = quantize_linear(weight, decision, scheme, torch.float32).dequantize() - weight
        lost.append(float(((off @ hessian) * off).sum()))
    assert lost[1] < 0.9 * lost[0]


def test_lwc_starts_from_the_ranges_found(streamed: Streamed, block: Block) -> None:
    _, stream = streamed
    context = context_of(block, stream, "W2A16g32", LWCSettings())
    scheme = context.allocation.default
    weights = weights_of(block, BlockDecisions())
    start = BlockDecisions(linears={n: decided_alone("easyquant", w, scheme) for n, w in weights.items()})
    learnable = lwc.Clipping(block, context, start)
    after = learnable.decide({f"{n}.weight": w for n, w in weights.items()}, start)
    assert len(weights) == 7
    for name, weight in weights.items():
        before, now = start.linear(name), after.linear(name)
        assert before.low is not None and now.low is not None
        inside, tile = before.inside(weight), scheme.tile
        written = [quantize_linear(weight, one, scheme, torch.float32).dequantize() for one in (before, now)]
        assert torch.linalg.vector_norm(written[0] - written[1]) < 0.1 * torch.linalg.vector_norm(weight - written[0])
        ends = fitted(inside, scheme.weight, tile, torch.float32, alignment=16.0)
        assert torch.equal(ends[0], before.low)


@pytest.mark.parametrize(
    "method", ["easyquant+lwc", "easyquant-outliers+gptq", "easyquant-outliers+lwc+gptq", "easyquant+gptq"]
)
def test_composed(tiny: Checkpoints, tmp_path: Path, text: str, method: str) -> None:
    """What follows keeps the outliers, and ends with less error at the block's output than easyquant alone."""
    errors = []
    for name in ("easyquant", method):
        recipe = bitwright.Recipe(str(tiny("float32")), "W2A16g32", name, calibration=text, samples=8, seqlen=32)
        result = bitwright.quantize(recipe, tmp_path / name)
        assert sum(row["outliers"] for row in rows_of(result.output)) > 0
        assert result.output_error is not None
        errors.append(result.output_error)
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        ("easyquant", {"outliers": "6%"}, "48 bits"),
        ("easyquant", {"range": "paper"}, "symmetric"),
        ("easyquant", {"range": "widest"}, "there is no range"),
        ("easyquant", {"norm": 9.0}, "between 0.5 and 4"),
        ("easyquant", {"norm": 1.0, "alignment": 4.0}, "alignment changes nothing beside norm"),
        ("easyquant", {"range": "paper", "norm": 1.0, "scheme": "W4A16sym"}, "norm changes nothing beside range paper"),
        ("easyquant", {"alignment": -1.0}, "0 or more"),
        ("easyquant", {"format": "compressed-tensors"}, "cannot hold outliers"),
        ("rtn", {"outliers": "3"}, "has no use for outliers"),
        ("easyquant+easyquant-outliers", {}, "both decide the outliers"),
        ("lwc+easyquant", {}, "easyquant decides the outliers, which comes before the range that lwc has already"),
        ("pact+lwc", {}, "both decide the range"),
        ("lwc+lwc", {}, "both decide the range"),
    ],
)
def test_refused_before_any_weight_is_read(tiny: Checkpoints, method: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        bitwright.plan(bitwright.Recipe(model=str(tiny("bfloat16")), method=method, **({"scheme": "W4A16"} | settings)))


def test_the_plan_says_that_outliers_are_not_in_it(tiny: Checkpoints, tmp_path: Path) -> None:
    recipe = bitwright.Recipe(str(tiny("bfloat16")), "W4A16", "easyquant")
    assert any("on top" in note for note in bitwright.plan(recipe).notes)
    result = bitwright.quantize(recipe, tmp_path / "out")
    assert not any("on top" in note for note in result.notes)
    assert result.outliers == sum(row["outliers"] for row in rows_of(result.output)) > 0
    assert not any("on top" in note for note in bitwright.plan(recipe.changed(outliers="0")).notes)
