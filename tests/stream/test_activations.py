"""The two streams against transformers' own hidden states, and the errors against their definition."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import Checkpoints
from tests.stream.conftest import SkeletonOf, loaded
from torch import Tensor

from bitwright.core.block import Block
from bitwright.stream import activations
from bitwright.stream.activations import advance, enter

LINEARS = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


def disturbed(block: Block, names: tuple[str, ...] = LINEARS, by: float = 0.05) -> Mapping[str, Tensor]:
    """Other weights in place of some, always the same ones for a block."""
    generator = torch.Generator().manual_seed(block.index)
    weights = {name: block.weight(name) for name in names}
    return {name: w + by * w.std() * torch.randn(w.shape, generator=generator).to(w) for name, w in weights.items()}


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).double().square().sum() / other.double().square().sum())


@pytest.fixture(params=["float32", "tied bfloat16", "biases", "linear rope"])
def folder(request: pytest.FixtureRequest, tiny: Checkpoints) -> Path:
    kinds: dict[str, dict[str, Any]] = {
        "float32": {"dtype": "float32"},
        "tied bfloat16": {"tied": True},
        "biases": {"dtype": "float32", "attention_bias": True, "mlp_bias": True},
        "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}},
    }
    return tiny(**kinds[request.param])


@torch.no_grad()
def test_the_reference_stream_is_transformers_own(folder: Path, skeleton: SkeletonOf, tokens: Tensor) -> None:
    made = skeleton(folder)
    model = loaded(folder)
    final: list[Tensor] = []
    model.get_submodule("model.norm").register_forward_pre_hook(lambda _, args: final.append(args[0]))
    hidden = model(tokens, output_hidden_states=True).hidden_states
    stream = enter(made, tokens)
    assert torch.equal(stream.activations.reference, hidden[0])
    assert torch.equal(stream.activations.quantized, hidden[0])
    for index in range(2):
        with made.block(index) as block:
            stream, _ = advance(block, disturbed(block), stream)
        # The last of transformers' hidden states has been through the final norm; what went into it is the block's.
        want = hidden[1] if index == 0 else final[0]
        torch.testing.assert_close(stream.activations.reference, want, rtol=1e-4, atol=1e-5)
    with made.head() as block:
        stream, _ = advance(block, {}, stream)
    torch.testing.assert_close(stream.activations.reference, model(tokens).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_quantized_stream_is_that_of_a_model_with_the_other_weights(
    folder: Path, skeleton: SkeletonOf, tokens: Tensor
) -> None:
    made = skeleton(folder)
    model = loaded(folder)
    stream, blocks = enter(made, tokens), model.get_submodule("model.layers")
    final: list[Tensor] = []
    model.get_submodule("model.norm").register_forward_pre_hook(lambda _, args: final.append(args[0]))
    for index, theirs in enumerate(blocks.children()):
        with made.block(index) as block:
            weights = disturbed(block)
            before = {name: block.weight(name).clone() for name in block.topology.linears}
            stream, errors = advance(block, weights, stream)
            for name, weight in before.items():
                assert torch.equal(block.weight(name), weight), "the block has its own weights again"
        for name, weight in weights.items():
            theirs.get_submodule(name).weight.copy_(weight)
    model(tokens)
    torch.testing.assert_close(stream.activations.quantized, final[0], rtol=1e-4, atol=1e-5)
    assert errors.block == pytest.approx(relative(stream.activations.quantized, stream.activations.reference), rel=1e-4)
    assert 1e-5 < errors.block < 1


@torch.no_grad()
def test_errors_of_linears_are_measured_on_the_reference_path(
    folder: Path, skeleton: SkeletonOf, tokens: Tensor
) -> None:
    """``|XW' - XWq'|^2 / |XW'|^2`` without biases, X what the original model gives the linear, earlier blocks too."""
    made = skeleton(folder)
    model = loaded(folder)
    inputs: dict[str, Tensor] = {}
    for index in range(2):
        for name in LINEARS:
            linear = model.get_submodule(f"model.layers.{index}.{name}")
            key = f"{index}.{name}"
            linear.register_forward_pre_hook(lambda _, args, key=key: inputs.update({key: args[0].double()}))
    model(tokens)
    stream = enter(made, tokens)
    for index in range(2):
        with made.block(index) as block:
            weights = disturbed(block, by=0.2)
            stream, errors = advance(block, weights, stream)
            assert set(errors.linears) == set(LINEARS)
            for name, weight in weights.items():
                x = inputs[f"{index}.{name}"]
                want = relative(x @ weight.double().T, x @ block.weight(name).double().T)
                assert errors.linears[name] == pytest.approx(want, rel=1e-4)


@torch.no_grad()
def test_no_change_is_no_error(tiny: Checkpoints, skeleton: SkeletonOf, tokens: Tensor) -> None:
    made = skeleton(tiny())
    stream = enter(made, tokens)
    with made.block(0) as block:
        stream, errors = advance(block, {name: block.weight(name) for name in block.topology.linears}, stream)
    assert errors.block == 0
    assert set(errors.linears.values()) == {0.0}
    assert torch.equal(stream.activations.reference, stream.activations.quantized)


@torch.no_grad()
def test_how_many_sequences_run_at_once_makes_no_difference(
    tiny: Checkpoints, skeleton: SkeletonOf, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for at_once in (1, 2 * tokens.shape[1], 10_000):
        monkeypatch.setattr(activations, "TOKENS_PER_PASS", at_once)
        made = skeleton(tiny("float32"))
        stream = enter(made, tokens)
        with made.block(0) as block:
            stream, errors = advance(block, disturbed(block), stream)
        results.append((stream.activations, errors))
    for other, errors in results[1:]:
        torch.testing.assert_close(other.reference, results[0][0].reference, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(other.quantized, results[0][0].quantized, rtol=1e-5, atol=1e-6)
        assert errors.block == pytest.approx(results[0][1].block, rel=1e-5)
        assert dict(errors.linears) == pytest.approx(dict(results[0][1].linears), rel=1e-5)


@pytest.mark.parametrize("fails", ["reference", "quantized"])
@torch.no_grad()
def test_the_block_is_its_own_again_whatever_happened(
    fails: str, tiny: Checkpoints, skeleton: SkeletonOf, tokens: Tensor
) -> None:
    made = skeleton(tiny())
    stream = enter(made, tokens)
    broken = replace(stream, activations=replace(stream.activations, **{fails: torch.zeros(1, 20, 3)}))
    with made.block(0) as block:
        originals = {name: block.linear(name).weight for name in LINEARS}
        with pytest.raises(RuntimeError):
            advance(block, disturbed(block), broken)
        for name in LINEARS:
            assert block.linear(name).weight is originals[name]
            assert not block.linear(name)._forward_hooks
