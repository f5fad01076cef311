"""Training steps in bfloat16: what is rounded, what is not, and that training still does what it is for."""

from collections.abc import Sequence

import pytest
import torch
from tests.conftest import Checkpoints
from tests.streamed import Streamed, block_of, configured, context_of, subject_of
from torch import Tensor
from torch.nn import functional as F

from bitwright.core.block import Block
from bitwright.core.decisions import BlockDecisions
from bitwright.core.training import Training
from bitwright.stream import precision
from bitwright.stream.activations import enter
from bitwright.stream.forward import forward, outputs_of
from bitwright.stream.precision import causal_attention, running_dtype, written_out_attention
from bitwright.stream.train import Objective, Trainer, learnables_of

SHORT = torch.bfloat16


def trainer(block: Block, streamed: Streamed, scheme: str, methods: str, arithmetic: torch.dtype | None) -> Trainer:
    inputs = streamed[1]
    context = context_of(block, inputs, scheme, Training(epochs=4, schedule="cosine"))
    learnables = learnables_of(configured(methods, "paper"), block, context, BlockDecisions())
    objective = Objective(inputs, list(outputs_of(block, {}, inputs.reference)), None)
    return Trainer(block, learnables, context, BlockDecisions(), objective, arithmetic=arithmetic)


@pytest.mark.parametrize("scheme", ["W2A16g32", "W3A16sym", "W4A4"])
@pytest.mark.parametrize("methods", ["lwc", "let+lwc"])
def test_training_in_bfloat16_improves(scheme: str, methods: str, block: Block, streamed: Streamed) -> None:
    """Nearly as much as in float32 at the least, on the objective as float32 measures it."""
    long, short = (trainer(block, streamed, scheme, methods, dtype) for dtype in (torch.float32, SHORT))
    zero = short.measure(BlockDecisions())
    assert zero == long.measure(BlockDecisions())  # measuring knows nothing of what training multiplies in
    found, reference = (training.measure(training.run()) for training in (short, long))
    assert zero - found > 0.7 * (zero - reference) > 0
    assert not short.fallbacks


def test_masters_losses_and_gradients_are_float32(
    block: Block, streamed: Streamed, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, real = trainer(block, streamed, "W4A4", "let+lwc", SHORT), Objective.loss
    outputs, losses, gradients = list[torch.dtype](), list[torch.dtype](), list[torch.dtype]()

    def loss(self: Objective, outputs: Tensor, rows: Sequence[int]) -> Tensor:
        computed = real(self, outputs, rows)
        losses.append(computed.dtype)
        return computed

    def note_gradient(leaf: Tensor) -> None:
        assert leaf.grad is not None
        gradients.append(leaf.grad.dtype)

    monkeypatch.setattr(Objective, "loss", loss)
    leaves = [p for each in training.learnables for tensors, _ in each.groups.values() for p in tensors.values()]
    for leaf in leaves:
        leaf.register_post_accumulate_grad_hook(note_gradient)
    hook = block.module.get_submodule("mlp.down_proj").register_forward_hook(lambda _, args, y: outputs.append(y.dtype))
    training.run()
    hook.remove()
    assert set(outputs) == {SHORT, torch.float32}  # steps in the one, measuring in the other
    assert set(losses) == set(gradients) == {torch.float32} and len(gradients) >= len(leaves) > 0
    assert training.learned
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in training.learned.values())
    substituted = training.substituted()
    assert substituted["mlp.down_proj.weight"].dtype == SHORT
    assert substituted["input_layernorm.weight"].dtype == torch.float32


def test_the_same_bytes_every_time(block: Block, streamed: Streamed) -> None:
    first, second = (trainer(block, streamed, "W4A4", "let+lwc", SHORT) for _ in range(2))
    first.run(), second.run()
    assert first.learned and first.learned.keys() == second.learned.keys()
    assert all(torch.equal(parameter, second.learned[name]) for name, parameter in first.learned.items())


def test_a_block_that_is_held_in_another_dtype(tiny: Checkpoints) -> None:
    """As on a GPU: held in bfloat16, and trained in float32 where that is asked for."""
    subject = subject_of(tiny(), SHORT)
    tokens = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(5))
    with enter(subject.skeleton, tokens) as stream, block_of(subject, 0) as block:
        for asked, runs, linear in (
            (None, SHORT, SHORT),
            (torch.float32, torch.float32, torch.float32),
            (torch.float16, torch.float32, torch.float16),
        ):
            training = trainer(block, (subject, stream.inputs()), "W3A16g32", "lwc", asked)
            made = training.substituted()
            assert made["input_layernorm.weight"].dtype == runs == training.running
            assert made["mlp.up_proj.weight"].dtype == linear
            zero = training.measure(BlockDecisions())
            assert training.measure(training.run()) < zero


def test_what_a_block_runs_in() -> None:
    assert running_dtype(torch.float32, SHORT) == torch.float32
    assert running_dtype(SHORT, SHORT) == SHORT
    assert running_dtype(torch.float16, SHORT) == torch.float32


@pytest.mark.parametrize(("heads", "keys"), [(4, 4), (6, 2), (3, 1)])
def test_written_out_attention_is_torchs(heads: int, keys: int) -> None:
    generator = torch.Generator().manual_seed(3)

    def drawn(heads: int) -> Tensor:
        return torch.randn(2, 17, heads, 8, generator=generator).transpose(1, 2).requires_grad_()

    given = q, k, v = drawn(heads), drawn(keys), drawn(keys)
    ours = causal_attention(q, k, v, 0.3)
    fused = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(ours, fused)
    along = torch.randn(ours.shape, generator=generator)
    for found, wanted in zip(*(torch.autograd.grad(x, given, along) for x in (ours, fused)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("most", [0, precision.MOST_SCORES])
def test_attention_over_many_tokens_is_left_in_place(
    most: int, block: Block, streamed: Streamed, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = list[int]()

    def counting(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        calls.append(1)
        return causal_attention(q, k, v, scaling)

    monkeypatch.setattr(precision, "MOST_SCORES", most)
    monkeypatch.setattr(precision, "causal_attention", counting)
    config = streamed[0].skeleton.model.config
    before, call = config._attn_implementation, streamed[1].quantized.call([0], block)
    with torch.no_grad():
        wanted = forward(block, {}, call)
        with written_out_attention(block, SHORT), torch.autocast("cpu", SHORT):
            found = forward(block, {}, call)
    assert config._attn_implementation == before
    assert len(calls) == (1 if most else 0)
    assert (found - wanted).norm() < 0.02 * wanted.norm()
    with written_out_attention(block, torch.float32):
        assert config._attn_implementation == before  # float32 has the fused one


def test_an_attention_of_the_models_own_is_left_alone(block: Block, streamed: Streamed) -> None:
    """Eager attention is in no list of transformers: it may have sinks, caps or compressed keys."""
    config = streamed[0].skeleton.model.config
    before, call = config._attn_implementation, streamed[1].quantized.call([0], block)
    config._attn_implementation = "eager"
    try:
        with torch.no_grad(), written_out_attention(block, SHORT):
            assert config._attn_implementation == "eager"
            assert forward(block, {}, call).isfinite().all()
    finally:
        config._attn_implementation = before
