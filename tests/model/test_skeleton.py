import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import Checkpoints, loaded
from tests.stream.conftest import SkeletonOf
from torch import nn

from bitwright.core.errors import CheckpointError
from bitwright.stream.skeleton import Skeleton

ROPE: dict[str, dict[str, Any]] = {
    "default": {},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}},
}


def in_memory(skeleton: Skeleton) -> set[str]:
    """Names of the model's parameters and buffers that hold values."""
    every = [*skeleton.model.named_parameters(), *skeleton.model.named_buffers()]
    return {name for name, tensor in every if not tensor.is_meta}


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_block_has_its_weights_inside_and_none_outside(
    dtype: str, shards: bool, tiny: Checkpoints, skeleton: SkeletonOf
) -> None:
    folder = tiny(dtype, shards=shards)
    made, original = skeleton(folder), loaded(folder)
    assert made.block_names == ("model.layers.0", "model.layers.1")
    assert in_memory(made) == set()
    for index, name in enumerate(made.block_names):
        with made.block(index) as block:
            assert (block.index, block.name) == (index, name)
            held = in_memory(made)
            assert held and all(each.startswith(f"{name}.") for each in held)
            for key, parameter in block.module.named_parameters():
                assert torch.equal(parameter, original.get_parameter(f"{name}.{key}"))
                assert not parameter.requires_grad
                assert f"{name}.{key}" in held
        assert in_memory(made) == set()


def test_a_block_is_freed_when_something_goes_wrong_inside(tiny: Checkpoints, skeleton: SkeletonOf) -> None:
    made = skeleton(tiny())
    with pytest.raises(ZeroDivisionError), made.block(0):
        raise ZeroDivisionError
    assert in_memory(made) == set()


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_a_block_of_its_own(tied: bool, tiny: Checkpoints, skeleton: SkeletonOf) -> None:
    folder = tiny(tied=tied)
    made, original = skeleton(folder), loaded(folder)
    assert made.tied == tied
    hidden = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    with made.head() as block:
        assert block.topology.linears == ("lm_head",)
        assert (block.path("lm_head"), block.index) == ("lm_head", 2)
        assert torch.equal(block.weight("lm_head"), original.get_parameter("lm_head.weight"))
        logits = original.get_submodule("lm_head")(original.get_submodule("model.norm")(hidden))
        assert torch.equal(block.module(hidden), logits)
    assert in_memory(made) == set()


@pytest.mark.parametrize("rope", ROPE)
def test_rotary_frequencies_are_those_of_the_loaded_model(rope: str, tiny: Checkpoints, skeleton: SkeletonOf) -> None:
    folder = tiny(**ROPE[rope])
    made, original = skeleton(folder), loaded(folder)
    with made.materialised("model"):
        buffers = dict(made.model.named_buffers())
        assert set(buffers) == {name for name, _ in original.named_buffers()}
        assert "model.rotary_emb.inv_freq" in buffers
        for name, buffer in original.named_buffers():
            assert torch.equal(buffers[name], buffer), name
        rotary, expected = (model.get_submodule("model.rotary_emb") for model in (made.model, original))
        assert rotary.attention_scaling == expected.attention_scaling
        hidden, positions = torch.zeros(1, 7, 64), torch.arange(7)[None]
        for one, other in zip(rotary(hidden, positions), expected(hidden, positions), strict=True):
            assert torch.equal(one, other)
    assert in_memory(made) == set()


def test_the_three_ropes_differ(tiny: Checkpoints, skeleton: SkeletonOf) -> None:
    """Without this the test before could pass with frequencies that no configuration reaches."""
    found = []
    for changes in ROPE.values():
        made = skeleton(tiny(**changes))
        with made.materialised("model"):
            found.append(made.model.get_buffer("model.rotary_emb.inv_freq").clone())
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def changed(source: Path, target: Path, config: dict[str, Any] | None = None, drop: str | None = None) -> Path:
    shutil.copytree(source, target)
    written = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(written | (config or {})))
    tensors = load_file(target / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if name != drop}
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_a_tensor_that_is_missing_is_named(tiny: Checkpoints, skeleton: SkeletonOf, tmp_path: Path) -> None:
    folder = changed(tiny(), tmp_path / "m", drop="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.layers\.1\.mlp\.up_proj\.weight', which its config"):
        skeleton(folder)


def test_a_tensor_of_another_shape_is_named(tiny: Checkpoints, skeleton: SkeletonOf, tmp_path: Path) -> None:
    folder = changed(tiny(), tmp_path / "m", config={"intermediate_size": 128})
    with pytest.raises(CheckpointError, match=r"mlp\..*weight' in .* has shape \[.*192.*\], but its .* \[.*128.*\]"):
        skeleton(folder)


def test_weights_are_computed_with_in_the_dtype_asked_for(tiny: Checkpoints, skeleton: SkeletonOf) -> None:
    made = skeleton(tiny("float32"), torch.bfloat16)
    with made.block(1) as block:
        assert {parameter.dtype for parameter in block.module.parameters()} == {torch.bfloat16}
        assert isinstance(block.linear("mlp.up_proj"), nn.Linear)
