"""Equalization: channels that stand out are brought back to the others' size, exactly, and no text is needed."""

from pathlib import Path

import pytest
import torch
from tests.conftest import Checkpoints, changed, measured
from tests.streamed import Streamed, outputs

import bitwright
from bitwright.core.block import Block
from bitwright.core.decisions import BlockDecisions
from bitwright.core.errors import RecipeError
from bitwright.core.method import Context
from bitwright.core.scheme import Allocation, Scheme
from bitwright.core.settings import Settings
from bitwright.methods import equalize
from bitwright.steps.apply import fold

CONTEXT = Context(Settings(), Allocation(Scheme.parse("W4A16")), torch.float32)


def plant(tensors: dict[str, torch.Tensor], prefix: str = "") -> None:
    """Outlier channels without a change of function: channel 3 in front of the MLP, channel 5 of down_proj's inputs."""
    tensors[f"{prefix}post_attention_layernorm.weight"][3] *= 64
    for linear in ("gate_proj", "up_proj"):
        tensors[f"{prefix}mlp.{linear}.weight"][:, 3] /= 64
    tensors[f"{prefix}mlp.up_proj.weight"][5] *= 32
    tensors[f"{prefix}mlp.down_proj.weight"][:, 5] /= 32


def test_nothing_stands_out(block: Block) -> None:
    assert not equalize.METHOD.decide(block, CONTEXT, BlockDecisions()).sites


def test_channels_that_stand_out(streamed: Streamed, block: Block) -> None:
    with torch.no_grad():
        plant(block.tensors)
    found = equalize.METHOD.decide(block, CONTEXT, BlockDecisions()).sites
    assert set(found) == {"norm->gate,up", "up->down"}
    for name, channel, size in (("norm->gate,up", 3, 64), ("up->down", 5, 32)):
        scale = found[name].scale
        assert scale[channel] in (size / 2, size, size * 2)
        assert scale.sum() == scale[channel] + len(scale) - 1, "the others have none"
    folded = fold(block.tensors, block.topology, BlockDecisions(found), CONTEXT.allocation, torch.float32)
    after, before = (outputs(block, tensors, streamed[1].reference) for tensors in (folded.full, {}))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    down = folded.full["mlp.down_proj.weight"].norm(dim=0)
    assert 0.3 < float(down[5] / down.median()) < 3


@pytest.mark.parametrize("method", ["equalize+rtn", "equalize+easyquant"])
def test_what_outliers_cost_is_won_back(method: str, tiny: Checkpoints, tmp_path: Path) -> None:
    def with_outliers(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(2):
            plant(tensors, f"model.layers.{layer}.")

    model = changed(tiny("bfloat16"), tmp_path / "model", with_outliers)
    lost: list[float] = []
    for name in (method.removeprefix("equalize+"), method):
        out = tmp_path / name
        bitwright.quantize(bitwright.Recipe(str(model), "W4A16", name), out)
        divergence = measured(out, seqlen=64, windows=8, reference=model).kl_divergence
        assert divergence is not None
        lost.append(divergence)
    assert lost[1] < 0.9 * lost[0]


def test_it_comes_first(tiny: Checkpoints, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"write equalize\+easyquant"):
        bitwright.quantize(bitwright.Recipe(str(tiny()), "W4A16", "easyquant+equalize"), tmp_path / "out")
    with pytest.raises(RecipeError, match="both decide the transform"):
        bitwright.quantize(
            bitwright.Recipe(str(tiny()), "W4A16", "equalize+smoothquant+rtn", calibration="builtin"), tmp_path / "out"
        )
