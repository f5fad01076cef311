"""The two streams against transformers' own hidden states, and the errors against their definition."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import Checkpoints, loaded
from tests.stream.conftest import SkeletonOf
from torch import Tensor

from bitwright.core.block import Block
from bitwright.core.decisions import BlockDecisions, SiteDecision
from bitwright.core.scheme import Allocation, Scheme
from bitwright.steps.activations import GRIDS
from bitwright.steps.apply import Folded, fold
from bitwright.stream import forward
from bitwright.stream.activations import Activations, Stream, StreamErrors, advance, enter, replay, statistics
from bitwright.stream.forward import forward_all

SCHEME = Scheme.parse("W3A16g32")
LINEARS = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


def disturbed(block: Block, names: tuple[str, ...] = LINEARS, by: float = 0.05) -> Mapping[str, Tensor]:
    """Other weights in place of some, always the same ones for a block."""
    generator = torch.Generator().manual_seed(block.index)
    weights = {name: block.weight(name) for name in names}
    return {name: w + by * w.std() * torch.randn(w.shape, generator=generator).to(w) for name, w in weights.items()}


def folded(block: Block, decisions: BlockDecisions | None = None, scheme: Scheme = SCHEME) -> Folded:
    parameters = dict(block.module.named_parameters())
    return fold(parameters, block.topology, decisions or BlockDecisions(), Allocation(scheme), torch.float32)


def step(block: Block, weights: Mapping[str, Tensor], stream: Stream) -> tuple[Stream, StreamErrors]:
    """``advance`` with these weights written in place of some, and the block's own in place of the others."""
    written = {f"{name}.weight": weights.get(name, block.weight(name)) for name in block.topology.linears}
    return advance(block, folded(block), written, SCHEME, stream)


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
            stream, _ = step(block, disturbed(block), stream)
        # The last of transformers' hidden states has been through the final norm; what went into it is the block's.
        want = hidden[1] if index == 0 else final[0]
        torch.testing.assert_close(stream.activations.reference, want, rtol=1e-4, atol=1e-5)
    with made.head() as block:
        logits = forward_all(block, {}, stream.activations.reference, stream.kwargs_of(block))
    torch.testing.assert_close(logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_quantized_stream_is_that_of_a_model_with_the_other_weights(
    folder: Path, skeleton: SkeletonOf, tokens: Tensor
) -> None:
    made = skeleton(folder)
    model = loaded(folder)
    stream, blocks = enter(made, tokens), model.get_submodule("model.layers")
    final: list[Tensor] = []
    model.get_submodule("model.norm").register_forward_pre_hook(lambda _, args: final.append(args[0]))
    errors: list[StreamErrors] = []
    for index, theirs in enumerate(blocks.children()):
        with made.block(index) as block:
            weights = disturbed(block)
            before = {name: block.weight(name).clone() for name in block.topology.linears}
            stream, of_block = step(block, weights, stream)
            errors.append(of_block)
            for name, weight in before.items():
                assert torch.equal(block.weight(name), weight), "the block has its own weights again"
        for name, weight in weights.items():
            theirs.get_parameter(f"{name}.weight").copy_(weight)
    model(tokens)
    torch.testing.assert_close(stream.activations.quantized, final[0], rtol=1e-4, atol=1e-5)
    last = relative(stream.activations.quantized, stream.activations.reference)
    assert errors[-1].block == pytest.approx(last, rel=1e-4)
    assert 1e-5 < last < 1


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
            stream, errors = step(block, weights, stream)
            assert set(errors.linears) == set(block.topology.linears) > set(LINEARS)
            assert all(errors.linears[name] == 0 for name in set(block.topology.linears) - set(LINEARS))
            for name, weight in weights.items():
                x = inputs[f"{index}.{name}"]
                want = relative(x @ weight.double().T, x @ block.weight(name).double().T)
                assert errors.linears[name] == pytest.approx(want, rel=1e-4)


@torch.no_grad()
def test_no_change_is_no_error(tiny: Checkpoints, skeleton: SkeletonOf, tokens: Tensor) -> None:
    made = skeleton(tiny())
    stream = enter(made, tokens)
    with made.block(0) as block:
        stream, errors = step(block, {}, stream)
    assert errors.block == 0
    assert set(errors.linears) == set(block.topology.linears)
    assert set(errors.linears.values()) == {0.0}
    assert torch.equal(stream.activations.reference, stream.activations.quantized)


@torch.no_grad()
def test_how_many_sequences_run_at_once_makes_no_difference(
    tiny: Checkpoints, skeleton: SkeletonOf, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for at_once in (1, 2 * tokens.shape[1], 10_000):
        monkeypatch.setattr(forward, "TOKENS_PER_PASS", at_once)
        made = skeleton(tiny("float32"))
        stream = enter(made, tokens)
        with made.block(0) as block:
            stream, errors = step(block, disturbed(block), stream)
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
    scheme = Scheme.parse("W4A8KV8")
    with made.block(0) as block:
        originals = dict(block.module.named_parameters())
        attention = made.model.config._attn_implementation
        found = folded(block, scheme=scheme)
        with pytest.raises(RuntimeError):
            advance(block, found, found.written(), scheme, broken)
        assert all(parameter is originals[name] for name, parameter in block.module.named_parameters())
        for module in block.module.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks
            assert not hasattr(module, GRIDS)
        assert made.model.config._attn_implementation == attention


@pytest.mark.parametrize("scheme", ["W3A16g32", "W4A4", "W4A8KV4"])
@torch.no_grad()
def test_a_block_that_was_finished_before_is_passed_as_it_was_then(
    scheme: str, tiny: Checkpoints, skeleton: SkeletonOf, tokens: Tensor
) -> None:
    """To the last bit, with a transform too: a run that is continued gives the same bytes."""
    made, wanted = skeleton(tiny("float32")), Scheme.parse(scheme)
    stream = enter(made, tokens)
    for index in range(2):
        with made.block(index) as block:
            found = folded(block, scaled(block), wanted)
            assert found.transformed and found.moved
            after, errors = advance(block, found, found.written(), wanted, stream)
            again = replay(block, found.written(), wanted, stream)
        assert torch.equal(again.activations.reference, after.activations.reference)
        assert torch.equal(again.activations.quantized, after.activations.quantized)
        assert errors.block > 0
        stream = after


@pytest.mark.parametrize("scheme", ["W3A16g32", "W4A4"])
@pytest.mark.parametrize("transformed", [False, True])
@torch.no_grad()
def test_streams_that_are_given_up_lend_their_memory(
    scheme: str, transformed: bool, tiny: Checkpoints, skeleton: SkeletonOf, tokens: Tensor
) -> None:
    """But not where both are still one; and what comes out is the same to the last bit."""
    made, wanted = skeleton(tiny("float32")), Scheme.parse(scheme)
    first = enter(made, tokens)
    with made.block(0) as block:
        found = folded(block, scaled(block) if transformed else None, wanted)
        stream, _ = advance(block, found, found.written(), wanted, first, in_place=True)
        kept, _ = advance(block, found, found.written(), wanted, first)
    with made.block(1) as block:
        found = folded(block, scaled(block) if transformed else None, wanted)
        want, errors = advance(block, found, found.written(), wanted, kept)
        replayed = replay(block, found.written(), wanted, copied(stream), in_place=True)
        after, same = advance(block, found, found.written(), wanted, stream, in_place=True)
    assert same == errors
    for name in ("reference", "quantized"):
        before, now = getattr(stream.activations, name), getattr(after.activations, name)
        assert now is before
        assert torch.equal(now, getattr(want.activations, name))
        assert torch.equal(now, getattr(replayed.activations, name))


def copied(stream: Stream) -> Stream:
    inputs = stream.activations
    return replace(stream, activations=Activations(inputs.reference.clone(), inputs.quantized.clone()))


def scaled(block: Block) -> BlockDecisions:
    """Scales at the block's first site."""
    site = block.topology.sites[0]
    scale = 0.5 + torch.rand(site.channels, generator=torch.Generator().manual_seed(block.index))
    return BlockDecisions(sites={site.name: SiteDecision(scale)})


@torch.no_grad()
def test_a_transform_leaves_the_reference_stream_alone(folder: Path, skeleton: SkeletonOf, tokens: Tensor) -> None:
    """And the errors of the linears are those against the transformed weights, on the inputs they then have."""
    made = skeleton(folder)
    stream = enter(made, tokens)
    with made.block(0) as block:
        site, decisions = block.topology.sites[0], scaled(block)
        plain, _ = advance(block, folded(block), folded(block).written(), SCHEME, stream)
        found = folded(block, decisions)
        inputs: dict[str, Tensor] = {}
        hooks = [
            block.linear(side.module).register_forward_pre_hook(
                lambda _, args, name=side.module: inputs.update({name: args[0].double()})
            )
            for side in site.consumers
        ]
        forward_all(block, {}, stream.activations.reference, stream.kwargs_of(block))
        for hook in hooks:
            hook.remove()
        after, errors = advance(block, found, found.written(), SCHEME, stream)
    assert torch.equal(after.activations.reference, plain.activations.reference)
    scale = decisions.sites[site.name].scale.double()
    assert inputs
    for name, x in inputs.items():
        w, wq = found.full[f"{name}.weight"].double(), found.linears[name].dequantize().double()
        want = relative((x / scale) @ wq.T, (x / scale) @ w.T)
        assert errors.linears[name] == pytest.approx(want, rel=1e-3)


@torch.no_grad()
def test_statistics_are_those_of_every_linears_input(folder: Path, skeleton: SkeletonOf, tokens: Tensor) -> None:
    made, model = skeleton(folder), loaded(folder)
    inputs: dict[str, Tensor] = {}
    stream = enter(made, tokens)
    with made.block(0) as block:
        for name in block.topology.linears:
            model.get_submodule(block.path(name)).register_forward_pre_hook(
                lambda _, args, name=name: inputs.update({name: args[0].flatten(0, -2)})
            )
        hidden = model(tokens, output_hidden_states=True).hidden_states
        found, outputs = statistics(block, stream)
        assert not any(module._forward_pre_hooks for module in block.module.modules())
    torch.testing.assert_close(outputs, hidden[1], rtol=1e-4, atol=1e-5)
    assert set(found) == set(inputs) == set(block.topology.linears)
    for name, x in inputs.items():
        assert found[name].tokens == tokens.numel()
        torch.testing.assert_close(found[name].min, x.amin(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[name].max, x.amax(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[name].absmax, x.abs().amax(0), rtol=1e-4, atol=1e-5)
