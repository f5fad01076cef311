"""OmniQuant on tiny models: what it learns, that it heals, and that everything folds away."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import Checkpoints
from tests.methods.conftest import divergence
from tests.streamed import Streamed, block_of, configured, context_of, outputs, subject_of
from torch import Tensor

import bitwright
from bitwright.core.block import Block, Topology
from bitwright.core.decisions import BlockDecisions
from bitwright.core.errors import OutputError, RecipeError
from bitwright.core.scheme import Allocation, Scheme
from bitwright.core.training import Training
from bitwright.methods import compose
from bitwright.prepare import block_way
from bitwright.steps.activations import quantized_activations
from bitwright.steps.apply import fold
from bitwright.stream.activations import Activations
from bitwright.stream.forward import outputs_of
from bitwright.stream.train import Objective, Trainer, learnables_of
from bitwright.written import finishing

UNTRAINED = ("rtn", "gptq", "smoothquant", "osplus", "awq")
QUICK = Training(epochs=4, schedule="cosine")


def trainer(
    block: Block, inputs: Activations, scheme: str, methods: str, training: Training, **asked: object
) -> Trainer:
    """Of methods with the paper's settings, but for those asked for."""
    context = context_of(block, inputs, scheme, training)
    learnables = learnables_of(configured(methods, "paper", **asked), block, context, BlockDecisions())
    objective = Objective(inputs, list(outputs_of(block, {}, inputs.reference)), None)
    return Trainer(block, learnables, context, BlockDecisions(), objective)


@pytest.mark.parametrize("methods", ["lwc", "pact", "lsq", "let", "let+lwc", "let+pact", "let+lsq"])
@pytest.mark.parametrize("scheme", ["W2A16g32", "W3A16sym", "W4A4"])
def test_training_improves_on_min_max(streamed: Streamed, methods: str, scheme: str) -> None:
    subject, inputs = streamed
    with block_of(subject, 0) as block:
        training = trainer(block, inputs, scheme, methods, QUICK)
        zero = training.measure(BlockDecisions())
        found = training.measure(training.run())
    assert found <= zero  # a block is never worse than min-max on its own objective
    if "lwc" in methods:
        assert found < (0.99 if scheme == "W4A4" else 0.97) * zero


@pytest.mark.parametrize("rate", [1e-2, 3.0, 1e4])
def test_never_worse_than_min_max_whatever_the_rate(streamed: Streamed, rate: float) -> None:
    subject, inputs = streamed
    with block_of(subject, 1) as block:
        training = trainer(block, inputs, "W2A16", "let+lwc", QUICK, lwc_lr=rate, let_lr=rate)
        zero = training.measure(BlockDecisions())
        decided = training.run()
        assert training.measure(decided) <= zero
    if rate > 1e3:
        assert decided.fallbacks  # said, not silent


def test_a_loss_that_is_not_finite_goes_back_and_slower(streamed: Streamed, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, inputs = streamed
    with block_of(subject, 0) as block:
        training = trainer(block, inputs, "W3A16", "lwc", QUICK)
        real, calls = Objective.loss, []

        def breaks(self: Objective, outputs: Tensor, rows: Sequence[int]) -> Tensor:
            loss = real(self, outputs, rows)
            calls.extend([rows] * outputs.requires_grad)
            return loss * float("nan") if outputs.requires_grad and len(calls) == 12 else loss

        monkeypatch.setattr(Objective, "loss", breaks)
        decided = training.run()
        monkeypatch.undo()
        assert training.measure(decided) < training.measure(BlockDecisions())
    assert "not finite" in decided.fallbacks[0] and "x 0.3" in decided.fallbacks[0]
    assert all(torch.isfinite(p).all() for p in training.learned.values())


@pytest.mark.parametrize("methods", ["lwc", "let+lwc"])
@pytest.mark.parametrize("scheme", ["W3A16g32", "W4A4", "W4A4KV16", "W4A16KV4"])
def test_training_output_is_the_folded_output(streamed: Streamed, methods: str, scheme: str) -> None:
    """What training saw is what is written: nothing of the learned parameters is needed afterwards."""
    subject, inputs = streamed
    with block_of(subject, 0) as block:
        training = trainer(block, inputs, scheme, methods, QUICK)
        training.run()
        with torch.no_grad():
            trained = training.substituted()
        folded = fold(
            training.base, block.topology, training.decisions(), Allocation(Scheme.parse(scheme)), torch.float32
        )
        with quantized_activations(block, Scheme.parse(scheme)):
            during, after = (outputs(block, p, inputs.quantized) for p in (trained, folded.written()))
        assert set(folded.written()) <= set(block.tensors)
    difference = (during - after).norm() / during.norm()
    assert difference < (5e-3 if "A4" in scheme else 1e-5)  # a code of an activation may fall to the other side


def test_scales_alone_leave_the_full_precision_block_alone(streamed: Streamed) -> None:
    subject, inputs = streamed
    with block_of(subject, 0) as block:
        training = trainer(block, inputs, "W4A4", "let", QUICK, sites="all")
        training.run()
        decided = training.decisions()
        full = fold(training.base, block.topology, decided, Allocation(Scheme.parse("W4A4")), torch.float32).full
        before, after = (outputs(block, tensors, inputs.reference) for tensors in ({}, full))
    assert set(decided.sites) == {"norm->qkv", "q.k", "v->o", "norm->gate,up", "up->down"}
    assert any((decision.scale - 1).abs().max() > 0.1 for decision in decided.sites.values())
    torch.testing.assert_close(after, before, rtol=2e-4, atol=2e-4)


def settled(preset: str, scheme: str, methods: str = "let+lwc", **asked: object) -> dict[str, Any]:
    return compose(methods).settled(preset, Scheme.parse(scheme), asked).values()


def test_the_preset_is_the_papers() -> None:
    plain = settled("paper", "W2A16g64")
    assert (plain["epochs"], plain["aug_loss"], plain["lwc_lr"], plain["let_lr"]) == (40, True, 1e-2, 5e-3)
    wide = settled("paper", "W3A16sym")
    assert (wide["epochs"], wide["aug_loss"], wide["schedule"]) == (20, False, "constant")
    assert not wide["refine"] and not wide["drift"]
    assert settled("paper", "W3A16", epochs=2)["epochs"] == 2


def test_ours_trains_what_has_no_closed_form() -> None:
    both = settled("bitwright", "W3A16")
    assert (both["epochs"], both["refine"], both["schedule"]) == (5, True, "cosine")
    for asked, epochs in (({}, 0), ({"epochs": 3}, 3), ({"refine": False}, 5)):
        found = compose("lwc").settled("bitwright", Scheme.parse("W3A16"), asked).values()
        assert found["epochs"] == epochs


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("lwc_lr", 0.0, "lwc_lr is 0.0; a learning rate must be positive"),
        ("let_lr", -1.0, "let_lr is -1.0; a learning rate must be positive"),
        ("lwc_lr", float("nan"), "lwc_lr is nan; a learning rate must be positive"),
        ("epochs", -1, "epochs is -1; it must be at least 0"),
        ("schedule", "linear", "there is no schedule 'linear'; did you mean"),
        ("sites", "x", "there is no sites 'x'; Known: all, paper"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(key: str, value: object, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        compose("let+lwc").settled("bitwright", Scheme.parse("W3A16"), {key: value})


def test_what_has_no_closed_form_cannot_be_refined(recipe: bitwright.Recipe) -> None:
    with pytest.raises(RecipeError, match="pact has no use for refine"):
        bitwright.plan(recipe.changed(method="pact", refine=True))


def test_let_is_left_out_where_it_cannot_help(tiny: Checkpoints) -> None:
    topology = subject_of(tiny()).anatomy.blocks[0].topology

    def fitted(methods: str, scheme: str, topology: Topology | None = topology, **asked: str) -> tuple[str, str | None]:
        found, note = compose(methods).fitted(Scheme.parse(scheme), topology, asked)
        return "+".join(found.methods), note

    assert fitted("omniquant", "W3A16g32") == (
        "lwc",
        "let is left out: 16-bit activations do not need it, and no site of this architecture can absorb a shift. "
        "Going on with lwc; name --sites to keep it, which pays where channels are outliers",
    )
    assert fitted("let", "W3A16")[0] == "lwc"
    assert fitted("omniquant", "W3A16g32", sites="all") == ("let+lwc", None)
    assert fitted("omniquant", "W4A4") == fitted("omniquant", "W4A16KV4") == ("let+lwc", None)
    assert fitted("lwc", "W3A16") == ("lwc", None)
    assert fitted("omniquant", "W3A16g32", None) == ("let+lwc", None)
    shifts = subject_of(tiny(attention_bias=True)).anatomy.blocks[0].topology
    assert fitted("omniquant", "W3A16g32", shifts) == ("let+lwc", None)


@pytest.mark.parametrize("after_let", ["pact", "lsq"])
def test_thresholds_start_on_the_weights_that_let_starts_with(streamed: Streamed, after_let: str) -> None:
    """Before any step, LET with thresholds is LET with min-max."""
    subject, inputs = streamed
    with block_of(subject, 0) as block:
        alone, both = (trainer(block, inputs, "W4A4", text, QUICK) for text in ("let", f"let+{after_let}"))
        start = alone.measure(alone.decisions())
        assert both.measure(both.decisions()) == pytest.approx(start, rel=0.05)
        assert start < 0.98 * alone.measure(BlockDecisions()) or start > 1.02 * alone.measure(BlockDecisions())


@pytest.fixture(scope="module")
def recipe(tiny: Checkpoints, text: str) -> bitwright.Recipe:
    return bitwright.Recipe(
        model=str(tiny()), scheme="W4A4", calibration=text, samples=6, seqlen=48, epochs=2, method="omniquant"
    )


def test_parameters_are_saved_and_loaded(recipe: bitwright.Recipe, tmp_path: Path) -> None:
    """The same result without training, and a refusal for another scheme, model or method."""
    saved = tmp_path / "learned.safetensors"
    bitwright.quantize(recipe, tmp_path / "trained", save_parameters=saved)
    names = set(load_file(saved))
    assert "model.layers.0/lwc.a/self_attn.q_proj" in names and "model.layers.0/let.log_scale/q.k" in names
    again = replace(recipe, load_parameters=str(saved))
    bitwright.quantize(again, tmp_path / "loaded")
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("trained", "loaded"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    unlike: list[dict[str, Any]] = [
        {"scheme": "W6A6"}, {"method": "lwc"}, {"sites": "all"}, {"exclude": "*.q_proj"},
        {"scheme_for": "*.0.*.q_proj=W8A4"},
    ]  # fmt: skip
    for other in (again.changed(**changes) for changes in unlike):
        with pytest.raises(RecipeError, match="was saved for"):
            bitwright.quantize(other, tmp_path / "other")
    with pytest.raises(RecipeError, match="rtn learns nothing"):
        bitwright.quantize(again.changed(method="rtn", epochs=None), tmp_path / "other")
    for saving in (saved, tmp_path / "no" / "folder"):
        with pytest.raises(OutputError, match="name a new file"):
            bitwright.quantize(recipe, tmp_path / "other", save_parameters=saving)
    with pytest.raises(OutputError, match="is read and would be changed by it"):
        bitwright.quantize(recipe, tmp_path / "other", save_parameters=Path(recipe.model) / "learned.safetensors")
    with pytest.raises(RecipeError, match="learns nothing"):
        bitwright.quantize(
            recipe.changed(method="rtn", epochs=None), tmp_path / "other", save_parameters=tmp_path / "new"
        )
    (tmp_path / "broken").write_bytes(b"none")
    with pytest.raises(RecipeError, match="cannot be read as learned parameters"):
        bitwright.quantize(replace(recipe, load_parameters=str(tmp_path / "broken")), tmp_path / "other")
    assert not (tmp_path / "other.partial").exists()


def test_the_written_folder_is_better_than_rtn(recipe: bitwright.Recipe, tmp_path: Path) -> None:
    asked = recipe.changed(scheme="W2A16g32", epochs=6)
    rtn = divergence(asked.changed(method="rtn", epochs=None), tmp_path / "rtn")
    assert divergence(asked, tmp_path / "omniquant") < rtn


def test_a_run_killed_after_it_saved_goes_on(
    recipe: bitwright.Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own file of parameters is no obstacle; another run's is."""
    saved, out = tmp_path / "learned.safetensors", tmp_path / "out"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(finishing, "account_of", killed)
        with pytest.raises(KeyboardInterrupt):
            bitwright.quantize(recipe, out, save_parameters=saved)
    assert saved.exists() and not out.exists()
    assert bitwright.quantize(recipe, out, save_parameters=saved).resumed > 0


@pytest.mark.parametrize(
    ("method", "scheme"),
    [("lwc", "W3A16g32"), ("let+lwc", "W4A4"), ("pact", "W4A8KV4"), *((method, "W4A16") for method in UNTRAINED)],
)
def test_arithmetic_in_the_checkpoints_dtype(
    method: str, scheme: str, recipe: bitwright.Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the block computes in bfloat16, what is learned stays in float32."""
    monkeypatch.setattr(block_way, "pick_dtype", lambda name, device, stored: stored)
    epochs = None if method in UNTRAINED else 2
    result = bitwright.quantize(recipe.changed(method=method, scheme=scheme, epochs=epochs), tmp_path / "out")
    assert result.output_error is not None and 0 < result.output_error < 0.5
