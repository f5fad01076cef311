"""The promises of the driver that goes block by block: one block in memory, nothing done twice, true reports."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import Checkpoints, loaded
from tests.streamed import set_tokens_per_pass, subject_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bitwright.core.account import BlockReport
from bitwright.core.block import Block
from bitwright.core.configuration import Configured
from bitwright.core.decisions import BlockDecisions, Decision
from bitwright.core.method import Closed, Context
from bitwright.core.progress import Listener, Progress, silent
from bitwright.core.registry import find
from bitwright.core.scheme import Allocation, Scheme
from bitwright.core.settings import Settings
from bitwright.core.training import Training
from bitwright.methods import compose, rtn
from bitwright.stream.blocks import BlockDriver
from bitwright.stream.memory import estimate
from bitwright.stream.parts import Part, PartWriter, part_file
from bitwright.stream.run_plan import RunPlan
from bitwright.stream.subject import Subject

SCHEME = Scheme.parse("W3A16g32")
RTN = Configured("rtn", rtn.METHOD)
NewOutput = Callable[[], "Output"]


@dataclass(frozen=True)
class Unit:
    """A unit read back from its part."""

    report: BlockReport
    linears: Mapping[str, Tensor]
    passed: Mapping[str, Tensor]


class Output:
    """A folder of parts. ``order`` are the units that were made, ``finished`` those that were there before."""

    def __init__(self, folder: Path, finished: Sequence[str] = ()) -> None:
        format = find("formats", "bitwright").FORMAT
        self.writer, self.finished = PartWriter(folder, format, format), finished
        self.made: dict[str, Part] = {}

    @property
    def order(self) -> list[str]:
        return list(self.made)

    @property
    def units(self) -> dict[str, Unit]:
        return {unit: self._read(made) for unit, made in self.made.items()}

    def _read(self, made: Part) -> Unit:
        assert made.report is not None
        grids = {row.name: SCHEME.weight for row in made.report.linears}
        tensors = self.writer.read(made.file, grids)
        linears = {name: tensors[f"{name}.weight"] for name in grids}
        stored = {f"{name}.{leaf}" for name in grids for leaf in (*self.writer.format.leaves, "weight")}
        return Unit(made.report, linears, {name: each for name, each in tensors.items() if name not in stored})


@pytest.fixture
def output(tmp_path: Path) -> NewOutput:
    """Makes outputs in folders of their own."""
    numbers = count()

    def new() -> Output:
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        return Output(folder)

    return new


def go(
    subject: Subject,
    output: Output,
    tokens: Tensor | None,
    methods: Sequence[Configured] = (RTN,),
    with_head: bool = False,
    listener: Listener = silent,
    training: Training | None = None,
) -> Output:
    allocation = Allocation(SCHEME, {} if with_head else {"lm_head": None})
    plan = RunPlan(allocation, tuple(methods), subject.skeleton.checkpoint.dtype_of_weights, training)
    driver = BlockDriver(subject, plan, output.writer, tokens)
    files = {unit: part_file(number) for number, unit in enumerate(driver.units)}
    output.made |= {made.unit: made for made in driver.parts(files, output.finished, listener)}
    return output


def in_memory(subject: Subject) -> set[str]:
    return {name for name, parameter in subject.skeleton.model.named_parameters() if not parameter.is_meta}


@pytest.mark.parametrize("text", [False, True])
def test_one_block_is_in_memory_at_a_time(text: bool, tiny: Checkpoints, tokens: Tensor, output: NewOutput) -> None:
    """Beside it, what is outside of the blocks, once the calibration data have gone through."""
    made, seen = subject_of(tiny()), []

    def spy(block: Block, context: Context[Settings], decisions: BlockDecisions) -> BlockDecisions:
        parts = {".".join(name.split(".")[:3]) for name in in_memory(made)}
        seen.append((block.name, parts, context.data is not None))
        return decisions

    spying = Closed(summary="", settings=Settings, decides=frozenset({Decision.AXIS}), decide=spy)
    go(made, output(), tokens if text else None, [Configured("spy", spying), RTN], with_head=True)
    embedding, norm = ({"model.embed_tokens.weight"}, {"model.norm.weight"}) if text else (set[str](), set[str]())
    assert seen == [
        ("model.layers.0", {"model.layers.0"} | embedding, text),
        ("model.layers.1", {"model.layers.1"} | embedding, text),
        ("", {"lm_head.weight"} | embedding | norm, False),  # it has no stream of its own
    ]
    assert in_memory(made) == set()


def test_without_text_no_forward_pass_is_made(
    tiny: Checkpoints, monkeypatch: pytest.MonkeyPatch, output: NewOutput
) -> None:
    made = subject_of(tiny())

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a forward pass")

    monkeypatch.setattr("torch.nn.Module.__call__", refuse)
    sink = go(made, output(), None)
    assert sink.order == ["model.layers.0", "model.layers.1"]
    for result in sink.units.values():
        assert result.report.output_error is None
        assert all(row.output_error is None for row in result.report.linears)


def test_text_changes_no_code_of_a_method_that_needs_none(tiny: Checkpoints, tokens: Tensor, output: NewOutput) -> None:
    made = subject_of(tiny())
    without, with_text = go(made, output(), None, with_head=True), go(made, output(), tokens, with_head=True)
    assert without.order == with_text.order == ["model.layers.0", "model.layers.1", "lm_head"]
    for unit, result in without.units.items():
        for name, q in result.linears.items():
            assert torch.equal(q, with_text.units[unit].linears[name])


def test_what_is_passed_through_is_what_the_checkpoint_stores(tiny: Checkpoints, output: NewOutput) -> None:
    made, original = subject_of(tiny()), loaded(tiny(), torch.bfloat16)
    sink = go(made, output(), None, with_head=True)
    for unit in ("model.layers.0", "model.layers.1"):
        passed = sink.units[unit].passed
        assert set(passed) == {f"{unit}.{norm}_layernorm.weight" for norm in ("input", "post_attention")}
        for name, tensor in passed.items():
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor, original.get_parameter(name))
    assert sink.units["lm_head"].passed == {}


@torch.no_grad()
def test_reports_are_true(tiny: Checkpoints, tokens: Tensor, output: NewOutput) -> None:
    """Against two models of transformers: the original, and one with the weights that were written.

    The output layer has no output errors: its outputs are the logits of every calibration token.
    """
    folder = tiny()
    sink = go(subject_of(folder), output(), tokens, with_head=True)
    original, quantized = loaded(folder), loaded(folder)
    for result in sink.units.values():
        for name, q in result.linears.items():
            quantized.get_parameter(f"{name}.weight").copy_(q)
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, list[Tensor]] = {}
    for model in (original, quantized):
        for unit in sink.order:
            keep = outputs.setdefault(unit, [])
            model.get_submodule(unit).register_forward_hook(lambda _, args, y, keep=keep: keep.append(y.double()))
    for name in (name for result in sink.units.values() for name in result.linears):
        original.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: inputs.update({name: args[0].double()})
        )
    original(tokens)
    quantized(tokens)
    assert sink.order == ["model.layers.0", "model.layers.1", "lm_head"]
    for unit, result in sink.units.items():
        reference, mine = outputs[unit]
        assert result.report.name == unit
        of_block = unit != "lm_head"
        if of_block:
            assert result.report.output_error == pytest.approx(error(mine, reference), rel=1e-3)
        else:
            assert result.report.output_error is None
        assert [row.name for row in result.report.linears] == list(result.linears)
        for row in result.report.linears:
            w, q = original.get_parameter(f"{row.name}.weight").double(), result.linears[row.name]
            wq = q.double()
            assert (row.shape, row.tile) == (tuple(w.shape), (1, 32))
            assert row.weight_error == pytest.approx(error(wq, w), rel=1e-4)
            if of_block:
                want = error(inputs[row.name] @ wq.T, inputs[row.name] @ w.T)
                assert row.output_error == pytest.approx(want, rel=1e-3)
            else:
                assert row.output_error is None
            # 3 bits a code, and a scale of 16 and a zero point of 3 for every 32 of them.
            assert row.bits_per_weight == 3 + (16 + 3) / 32
            assert row.storage_bits == row.bits_per_weight * w.numel()


def error(one: Tensor, other: Tensor) -> float:
    return float((one - other).square().sum() / other.square().sum())


@pytest.mark.parametrize("done", [1, 2, 3])
def test_a_run_goes_on_where_another_stopped(done: int, tiny: Checkpoints, tokens: Tensor, output: NewOutput) -> None:
    made = subject_of(tiny())
    whole = go(made, output(), tokens, with_head=True)
    rest = go(made, Output(whole.writer.folder, whole.order[:done]), tokens, with_head=True)
    assert rest.order == whole.order[done:]
    for unit in rest.order:
        assert rest.made[unit].report == whole.made[unit].report


def test_finished_units_are_not_even_read_without_text(
    tiny: Checkpoints, monkeypatch: pytest.MonkeyPatch, output: NewOutput
) -> None:
    made = subject_of(tiny())
    whole = go(made, output(), None)
    monkeypatch.setattr(made.skeleton.checkpoint, "read", lambda *_: pytest.fail("a finished unit was read"))
    assert go(made, Output(whole.writer.folder, whole.order), None).order == []


def test_fallbacks_reach_the_report(tiny: Checkpoints, output: NewOutput) -> None:
    def falls_back(block: Block, context: Context[Settings], decisions: BlockDecisions) -> BlockDecisions:
        return BlockDecisions(fallbacks=(f"{block.name}: something else was done",))

    method = Closed(summary="", settings=Settings, decides=frozenset({Decision.RANGE}), decide=falls_back)
    sink = go(subject_of(tiny()), output(), None, [Configured("falling back", method)])
    assert sink.units["model.layers.1"].report.fallbacks == ("model.layers.1: something else was done",)


def test_progress_names_every_unit_and_comes_to_its_end(tiny: Checkpoints, output: NewOutput) -> None:
    heard: list[Progress] = []
    go(subject_of(tiny()), output(), None, with_head=True, listener=heard.append)
    assert [(p.done, p.total, p.unit) for p in heard[:3]] == [
        (0, 3, "model.layers.0"),
        (1, 3, "model.layers.1"),
        (2, 3, "lm_head"),
    ]
    assert (heard[-1].done, heard[-1].total) == (3, 3)
    assert all(p.stage == "quantize" and p.peak_bytes and p.peak_bytes > 2**20 for p in heard)


class Largest(TorchDispatchMode):
    """Notes the most elements that any tensor made while it lasts has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not result.is_meta:
            self.elements = max(self.elements, result.numel())
        return result


def test_the_output_layer_needs_no_logits_of_all_tokens_at_once(
    tiny: Checkpoints, monkeypatch: pytest.MonkeyPatch, output: NewOutput
) -> None:
    tokens = torch.randint(0, 256, (64, 32), generator=torch.Generator().manual_seed(0))
    set_tokens_per_pass(monkeypatch, 256)
    made = subject_of(tiny())
    with Largest() as largest:  # type: ignore[no-untyped-call] # torch's constructor has no types
        go(made, output(), tokens, with_head=True)
    assert largest.elements < tokens.numel() * 256 / 2


class Live(TorchDispatchMode):
    """Adds up the bytes of the tensors made while it lasts that are still there, and notes the most there were."""

    now = peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {each.untyped_storage().data_ptr() for each in args if isinstance(each, Tensor) and not each.is_meta}
        if isinstance(result, Tensor) and not result.is_meta and result.untyped_storage().data_ptr() not in known:
            storage = result.untyped_storage()
            self._count(storage.nbytes())
            weakref.finalize(storage, self._count, -storage.nbytes())
        return result

    def _count(self, nbytes: int) -> None:
        self.now += nbytes
        self.peak = max(self.peak, self.now)


@pytest.mark.parametrize("methods", ["rtn", "lwc", "let+lwc"])
@pytest.mark.parametrize("aug_loss", [False, True])
def test_the_budget_holds_the_activations(
    methods: str,
    aug_loss: bool,
    tiny: Checkpoints,
    monkeypatch: pytest.MonkeyPatch,
    output: NewOutput,
) -> None:
    """Two streams and the outputs of one pass, where something is trained too; one more with a second target."""
    tokens = torch.randint(0, 256, (128, 128), generator=torch.Generator().manual_seed(0))
    set_tokens_per_pass(monkeypatch, 256)
    made = subject_of(tiny())
    learned = {"epochs": 1, "aug_loss": aug_loss} if methods != "rtn" else {}
    configuration = compose(methods).settled("bitwright", SCHEME, learned)
    weights = sum(parameter.numel() * 4 for parameter in made.skeleton.model.parameters())
    with Live() as live:  # type: ignore[no-untyped-call] # torch's constructor has no types
        go(made, output(), tokens, configuration.methods, training=configuration.training)
    stream = tokens.numel() * made.skeleton.model.config.hidden_size * 4
    assert live.peak > 3 * stream > 5 * weights, "activations are what is measured here"
    wanted = estimate(made, tokens.numel(), 128 if methods != "rtn" else 0, aug_loss)
    assert live.peak < wanted.activations + wanted.block
