"""The two streams against transformers' own hidden states, and the errors against their definition."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import Checkpoints, loaded
from tests.streamed import block_of, read_by, set_tokens_per_pass, subject_of
from torch import Tensor, nn

from bitwright.core.block import Block
from bitwright.core.decisions import BlockDecisions, SiteDecision
from bitwright.core.scheme import Allocation, Scheme
from bitwright.model.calls import Call
from bitwright.model.walk import Walk
from bitwright.steps.activations import GRIDS
from bitwright.steps.apply import Folded, fold
from bitwright.stream.activations import Stream, StreamErrors, advance, enter, replay, statistics
from bitwright.stream.forward import Inputs

SCHEME = Scheme.parse("W3A16g32")
LINEARS = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


def disturbed(block: Block, names: tuple[str, ...] = LINEARS, by: float = 0.05) -> Mapping[str, Tensor]:
    """Other weights in place of some, always the same ones for a block."""
    generator = torch.Generator().manual_seed(block.index)
    weights = {name: block.weight(name) for name in names}
    return {name: w + by * w.std() * torch.randn(w.shape, generator=generator).to(w) for name, w in weights.items()}


def folded(block: Block, decisions: BlockDecisions | None = None, scheme: Scheme = SCHEME) -> Folded:
    return fold(block.tensors, block.topology, decisions or BlockDecisions(), Allocation(scheme), torch.float32)


def step(block: Block, weights: Mapping[str, Tensor], stream: Stream) -> StreamErrors:
    """``advance`` with these weights written in place of some, and the block's own in place of the others."""
    written = {f"{name}.weight": weights.get(name, block.weight(name)) for name in block.topology.linears}
    return advance(block, folded(block), written, SCHEME, stream)


def hidden(inputs: Inputs) -> Tensor:
    """The hidden states in front of a block, or of the output layer, [N, T, D]."""
    return torch.cat([call.hidden for call in inputs.calls])


def hidden_states(model: nn.Module, tokens: Tensor) -> tuple[list[Tensor], Tensor]:
    """Transformers' hidden states in front of each block and of the output layer, and those behind the last block."""
    last: list[Tensor] = []
    hook = model.get_submodule("model.norm").register_forward_pre_hook(lambda _, args: last.append(args[0]))
    states = model(tokens, output_hidden_states=True).hidden_states
    hook.remove()
    return list(states), last[0]


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
def test_the_reference_stream_is_transformers_own(folder: Path, tokens: Tensor) -> None:
    subject, model = subject_of(folder), loaded(folder)
    states, _ = hidden_states(model, tokens)
    with enter(subject.skeleton, tokens) as stream:
        assert torch.equal(hidden(stream.inputs().reference), states[0])
        assert torch.equal(hidden(stream.inputs().quantized), states[0])
        for index in range(2):
            assert stream.name == f"model.layers.{index}"
            with block_of(subject, index) as block:
                step(block, disturbed(block), stream)
            torch.testing.assert_close(hidden(stream.inputs().reference), states[index + 1], rtol=1e-4, atol=1e-5)
        assert stream.name == "lm_head"
        with block_of(subject, 2) as head:
            logits = head.module.get_submodule("lm_head")(hidden(stream.inputs().reference))
    torch.testing.assert_close(logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_quantized_stream_is_that_of_a_model_with_the_other_weights(folder: Path, tokens: Tensor) -> None:
    subject, model, errors = subject_of(folder), loaded(folder), list[StreamErrors]()
    _, reference = hidden_states(model, tokens)
    with enter(subject.skeleton, tokens) as stream:
        for index in range(2):
            with block_of(subject, index) as block:
                weights = disturbed(block)
                before = {name: block.weight(name).clone() for name in block.topology.linears}
                errors.append(step(block, weights, stream))
                for name, weight in before.items():
                    assert torch.equal(block.weight(name), weight), "the block has its own weights again"
            for name, weight in weights.items():
                model.get_parameter(f"model.layers.{index}.{name}.weight").copy_(weight)
        states, mine = hidden_states(model, tokens)
        torch.testing.assert_close(hidden(stream.inputs().quantized), states[-1], rtol=1e-4, atol=1e-5)
    last = relative(mine, reference)
    assert errors[-1].block == pytest.approx(last, rel=1e-4)
    assert 1e-5 < last < 1


@torch.no_grad()
def test_errors_of_linears_are_measured_on_the_reference_path(folder: Path, tokens: Tensor) -> None:
    """``|XW' - XWq'|^2 / |XW'|^2`` without biases, X what the original model gives the linear, earlier blocks too."""
    subject, model = subject_of(folder), loaded(folder)
    inputs: dict[str, Tensor] = {}
    for index in range(2):
        for name in LINEARS:
            linear = model.get_submodule(f"model.layers.{index}.{name}")
            key = f"{index}.{name}"
            linear.register_forward_pre_hook(lambda _, args, key=key: inputs.update({key: args[0].double()}))
    model(tokens)
    with enter(subject.skeleton, tokens) as stream:
        for index in range(2):
            with block_of(subject, index) as block:
                weights = disturbed(block, by=0.2)
                errors = step(block, weights, stream)
                assert set(errors.linears) == set(block.topology.linears) > set(LINEARS)
                assert all(errors.linears[name] == 0 for name in set(block.topology.linears) - set(LINEARS))
                for name, weight in weights.items():
                    x = inputs[f"{index}.{name}"]
                    want = relative(x @ weight.double().T, x @ block.weight(name).double().T)
                    assert errors.linears[name] == pytest.approx(want, rel=1e-4)


@torch.no_grad()
def test_no_change_is_no_error(tiny: Checkpoints, tokens: Tensor) -> None:
    subject = subject_of(tiny())
    with enter(subject.skeleton, tokens) as stream, block_of(subject, 0) as block:
        errors = step(block, {}, stream)
        assert errors.block == 0
        assert set(errors.linears) == set(block.topology.linears)
        assert set(errors.linears.values()) == {0.0}
        assert torch.equal(hidden(stream.inputs().reference), hidden(stream.inputs().quantized))


@torch.no_grad()
def test_how_many_sequences_run_at_once_makes_no_difference(
    tiny: Checkpoints, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, subject = list[tuple[Tensor, Tensor, StreamErrors]](), subject_of(tiny("float32"))
    for most in (1, 2 * tokens.shape[1], 10_000):
        set_tokens_per_pass(monkeypatch, most)
        with enter(subject.skeleton, tokens) as stream, block_of(subject, 0) as block:
            errors = step(block, disturbed(block), stream)
            results.append((hidden(stream.inputs().reference), hidden(stream.inputs().quantized), errors))
    for reference, quantized, errors in results[1:]:
        torch.testing.assert_close(reference, results[0][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(quantized, results[0][1], rtol=1e-5, atol=1e-6)
        assert errors.block == pytest.approx(results[0][2].block, rel=1e-5)
        assert dict(errors.linears) == pytest.approx(dict(results[0][2].linears), rel=1e-5)


@pytest.mark.parametrize("fails", ["reference", "quantized"])
@torch.no_grad()
def test_the_block_is_its_own_again_whatever_happened(fails: str, tiny: Checkpoints, tokens: Tensor) -> None:
    subject, scheme = subject_of(tiny()), Scheme.parse("W4A8KV8")
    with enter(subject.skeleton, tokens) as stream, block_of(subject, 0) as block:
        walk: Walk = getattr(stream, fails)
        walk.calls[:] = [Call((torch.zeros(1, 20, 3),), call.kwargs) for call in walk.calls]
        originals = dict(block.module.named_parameters())
        attention = subject.skeleton.model.config._attn_implementation
        before = folded(block, scheme=scheme)
        with pytest.raises(RuntimeError):
            advance(block, before, before.written(), scheme, stream)
        assert all(parameter is originals[name] for name, parameter in block.module.named_parameters())
        assert block.taps == []
        for module in block.module.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks
            assert not hasattr(module, GRIDS)
        assert subject.skeleton.model.config._attn_implementation == attention


@pytest.mark.parametrize("scheme", ["W3A16g32", "W4A4", "W4A8KV4"])
@torch.no_grad()
def test_a_block_that_was_finished_before_is_passed_as_it_was_then(
    scheme: str, tiny: Checkpoints, tokens: Tensor
) -> None:
    """To the last bit, with a transform too: a run that is continued gives the same bytes."""
    subject, wanted = subject_of(tiny("float32")), Scheme.parse(scheme)
    with enter(subject.skeleton, tokens) as stream, enter(subject.skeleton, tokens) as again:
        for index in range(2):
            with block_of(subject, index) as block:
                block_folded = folded(block, scaled(block), wanted)
                assert block_folded.transformed and block_folded.moved
                errors = advance(block, block_folded, block_folded.written(), wanted, stream)
                replay(block, block_folded.written(), wanted, again)
            assert errors.block > 0
            assert torch.equal(hidden(again.inputs().reference), hidden(stream.inputs().reference))
            assert torch.equal(hidden(again.inputs().quantized), hidden(stream.inputs().quantized))


def scaled(block: Block) -> BlockDecisions:
    """Scales at the block's first site."""
    site = block.topology.sites[0]
    scale = 0.5 + torch.rand(site.channels, generator=torch.Generator().manual_seed(block.index))
    return BlockDecisions(sites={site.name: SiteDecision(scale)})


@torch.no_grad()
def test_a_transform_leaves_the_reference_stream_alone(folder: Path, tokens: Tensor) -> None:
    """And the errors of the linears are those against the transformed weights, on the inputs they then have."""
    subject = subject_of(folder)
    with (
        enter(subject.skeleton, tokens) as stream,
        enter(subject.skeleton, tokens) as plain,
        block_of(subject, 0) as block,
    ):
        site, decisions = block.topology.sites[0], scaled(block)
        inputs = read_by(block, [side.module for side in site.consumers], stream.inputs().reference)
        block_folded = folded(block, decisions)
        advance(block, folded(block), folded(block).written(), SCHEME, plain)
        errors = advance(block, block_folded, block_folded.written(), SCHEME, stream)
        assert torch.equal(hidden(stream.inputs().reference), hidden(plain.inputs().reference))
    scale = decisions.sites[site.name].scale.double()
    assert len(inputs) == 3
    for name, x in inputs.items():
        w, wq = block_folded.full[f"{name}.weight"].double(), block_folded.linears[name].dequantize().double()
        want = relative((x / scale) @ wq.T, (x / scale) @ w.T)
        assert errors.linears[name] == pytest.approx(want, rel=1e-3)


@torch.no_grad()
def test_statistics_are_those_of_every_linears_input(folder: Path, tokens: Tensor) -> None:
    subject, model = subject_of(folder), loaded(folder)
    inputs: dict[str, Tensor] = {}
    with enter(subject.skeleton, tokens) as stream, block_of(subject, 0) as block:
        for name in block.topology.linears:
            model.get_submodule(block.path(name)).register_forward_pre_hook(
                lambda _, args, name=name: inputs.update({name: args[0].flatten(0, -2)})
            )
        states, _ = hidden_states(model, tokens)
        stats, made = statistics(block, stream.inputs().reference)
        assert block.taps == []
    torch.testing.assert_close(torch.cat(made), states[1], rtol=1e-4, atol=1e-5)
    assert set(stats) == set(inputs) == set(block.topology.linears)
    for name, x in inputs.items():
        assert stats[name].tokens == tokens.numel()
        torch.testing.assert_close(stats[name].min, x.amin(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(stats[name].max, x.amax(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(stats[name].absmax, x.abs().amax(0), rtol=1e-4, atol=1e-5)
