"""A model that is built without weights: what is in memory, and when."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import Checkpoints, loaded
from tests.streamed import block_of, subject_of

from bitwright.core.errors import CheckpointError
from bitwright.model.skeleton import Skeleton
from bitwright.model.source import Source
from bitwright.prepare import block_way

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
    """Names of the model's parameters that hold values."""
    return {name for name, tensor in skeleton.model.named_parameters() if not tensor.is_meta}


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_block_has_its_weights_inside_and_none_outside(dtype: str, shards: bool, tiny: Checkpoints) -> None:
    folder = tiny(dtype, shards=shards)
    subject, original = subject_of(folder), loaded(folder)
    names = [anatomy.name for anatomy in subject.anatomy.blocks]
    assert names == ["model.layers.0", "model.layers.1"]
    assert in_memory(subject.skeleton) == set()
    for index, name in enumerate(names):
        with block_of(subject, index) as block:
            assert (block.index, block.name) == (index, name)
            held = in_memory(subject.skeleton)
            assert held and all(each.startswith(f"{name}.") for each in held)
            for key, tensor in block.tensors.items():
                assert torch.equal(tensor, original.get_parameter(f"{name}.{key}"))
                assert f"{name}.{key}" in held
            assert not any(parameter.requires_grad for parameter in block.module.parameters())
        assert in_memory(subject.skeleton) == set()


def test_a_block_is_freed_when_something_goes_wrong_inside(tiny: Checkpoints) -> None:
    subject = subject_of(tiny())
    with pytest.raises(ZeroDivisionError), block_of(subject, 0):
        raise ZeroDivisionError
    assert in_memory(subject.skeleton) == set()


def test_the_rest_of_the_model_is_filled_as_it_is_used(tiny: Checkpoints) -> None:
    skeleton = subject_of(tiny()).skeleton
    with skeleton.walk(torch.zeros(2, 5, dtype=torch.int64)) as walk:
        assert in_memory(skeleton) == {"model.embed_tokens.weight"}
        for _ in range(2):
            walk.advance([call.hidden for call in walk.calls])
        assert walk.name == "lm_head"
        assert in_memory(skeleton) == {"model.embed_tokens.weight", "model.norm.weight"}
    assert in_memory(skeleton) == set()


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_a_block_of_its_own(tied: bool, tiny: Checkpoints) -> None:
    folder = tiny(tied=tied)
    subject, original = subject_of(folder), loaded(folder)
    assert subject.head is not None
    assert subject.head.weights[0].tensor == ("model.embed_tokens.weight" if tied else "lm_head.weight")
    hidden = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    with block_of(subject, 2) as block:
        assert block.topology.linears == ("lm_head",)
        assert (block.path("lm_head"), block.index) == ("lm_head", 2)
        assert torch.equal(block.weight("lm_head"), original.get_parameter("lm_head.weight"))
        logits = original.get_submodule("lm_head")(hidden)
        assert torch.equal(block.module.get_submodule("lm_head")(hidden), logits)
    assert in_memory(subject.skeleton) == set()


@pytest.mark.parametrize("rope", ROPE)
def test_rotary_frequencies_are_those_of_the_loaded_model(rope: str, tiny: Checkpoints) -> None:
    folder = tiny(**ROPE[rope])
    model, original = subject_of(folder).skeleton.model, loaded(folder)
    buffers = dict(model.named_buffers())
    assert set(buffers) == {name for name, _ in original.named_buffers()}
    assert "model.rotary_emb.inv_freq" in buffers
    for name, buffer in original.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    rotary, expected = (each.get_submodule("model.rotary_emb") for each in (model, original))
    assert rotary.attention_scaling == expected.attention_scaling
    hidden, positions = torch.zeros(1, 7, 64), torch.arange(7)[None]
    for one, other in zip(rotary(hidden, positions), expected(hidden, positions), strict=True):
        assert torch.equal(one, other)


def test_the_three_ropes_differ(tiny: Checkpoints) -> None:
    """Without this the test before could pass with frequencies that no configuration reaches."""
    models = [subject_of(tiny(**changes)).skeleton.model for changes in ROPE.values()]
    first, *others = (model.get_buffer("model.rotary_emb.inv_freq") for model in models)
    assert not any(torch.equal(first, other) for other in others)


def changed(source: Path, target: Path, config: dict[str, Any] | None = None, drop: str | None = None) -> Path:
    shutil.copytree(source, target)
    written = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(written | (config or {})))
    tensors = load_file(target / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if name != drop}
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_a_tensor_that_is_missing_is_named(tiny: Checkpoints, tmp_path: Path) -> None:
    folder = changed(tiny(), tmp_path / "m", drop="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.layers\.1\.mlp\.up_proj\.weight', which its config"):
        block_way.subject_of(Source.open(folder), "cpu")


def test_a_tensor_of_another_shape_is_named(tiny: Checkpoints, tmp_path: Path) -> None:
    folder = changed(tiny(), tmp_path / "m", config={"intermediate_size": 128})
    with pytest.raises(CheckpointError, match=r"mlp\..*weight' in .* has shape \[.*192.*\], but its .* \[.*128.*\]"):
        block_way.subject_of(Source.open(folder), "cpu")


def test_weights_are_computed_with_in_the_dtype_asked_for(tiny: Checkpoints) -> None:
    with block_of(subject_of(tiny("float32"), torch.bfloat16), 1) as block:
        assert {parameter.dtype for parameter in block.module.parameters()} == {torch.bfloat16}
        assert (block.dtype, block.device.type) == (torch.bfloat16, "cpu")
