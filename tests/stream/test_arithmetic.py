"""Which dtype a training multiplies in, who says so, and that a run is not continued in another."""

import json
from pathlib import Path

import pytest
import torch
from tests.checkpoint.conftest import Killed
from tests.conftest import Checkpoints

import bitwright
from bitwright.core.errors import OutputError, RecipeError
from bitwright.core.progress import Progress
from bitwright.prepare.prepared import prepare
from bitwright.prepare.question import Question
from bitwright.stream import precision
from bitwright.stream.precision import pick_arithmetic

CPU, GPU = torch.device("cpu"), torch.device("cuda")
PROBES = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")


@pytest.fixture
def recipe(tiny: Checkpoints, text: Path) -> bitwright.Recipe:
    return bitwright.Recipe(
        str(tiny()), "W4A4", method="let+lwc", calibration=str(text), samples=2, seqlen=32, epochs=1
    )


@pytest.mark.parametrize(("avx", "amx"), [(True, False), (False, True), (False, False)])
def test_auto_is_what_the_hardware_is_fast_with(avx: bool, amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for probe, answer in zip(PROBES, (avx, amx), strict=True):
        monkeypatch.setattr(torch.cpu, probe, lambda answer=answer: answer, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    able = avx or amx
    assert pick_arithmetic("auto", CPU, torch.float32) == (torch.bfloat16 if able else torch.float32)
    for held in (torch.bfloat16, torch.float16, torch.float32):
        assert pick_arithmetic("auto", GPU, held) == held  # a GPU's blocks are held in the checkpoint's dtype
    assert pick_arithmetic("float32", CPU, torch.float32) == torch.float32
    assert pick_arithmetic("bfloat16", GPU, torch.float16) == torch.bfloat16


@pytest.mark.parametrize("missing", ["probes", "library"])
def test_a_torch_that_cannot_tell_counts_as_unable(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for probe in PROBES:
        if missing == "probes":
            monkeypatch.delattr(torch.cpu, probe, raising=False)
        else:
            monkeypatch.setattr(torch.cpu, probe, lambda: True, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: missing != "library")
    assert not precision.multiplies_bfloat16()


@pytest.mark.parametrize("able", [True, False])
def test_the_account_says_what_auto_came_to(
    able: bool, recipe: bitwright.Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: able)
    bitwright.quantize(recipe, tmp_path / "out")
    account = json.loads((tmp_path / "out" / "bitwright.json").read_text())
    assert account["settings"]["precision"] == ("bfloat16" if able else "float32")


def test_a_run_is_not_continued_in_another_arithmetic(
    recipe: bitwright.Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(progress: Progress) -> None:
        if progress.stage == "quantize" and progress.done == 1:
            raise Killed

    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: True)
    with pytest.raises(Killed):
        bitwright.quantize(recipe, tmp_path / "out", listener=stop)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(precision, "multiplies_bfloat16", lambda: False)
        with pytest.raises(
            OutputError, match="arithmetic: 'cpu float32, training in bfloat16' -> 'cpu float32, training in float32'"
        ):
            bitwright.quantize(recipe, tmp_path / "out")
    assert bitwright.quantize(recipe, tmp_path / "out").resumed > 0


def test_what_is_not_trained_is_the_same_everywhere(recipe: bitwright.Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: True)
    assert prepare(Question.of(recipe)).arithmetic == torch.bfloat16
    assert prepare(Question.of(recipe.changed(scheme="W3A16", method="lwc", epochs=None))).arithmetic is None
    assert prepare(Question.of(recipe.changed(method="rtn", epochs=None))).arithmetic is None


def test_a_precision_that_cannot_be_meant_is_refused(recipe: bitwright.Recipe) -> None:
    with pytest.raises(RecipeError, match="there is no precision 'bfloat32'; did you mean"):
        bitwright.plan(recipe.changed(precision="bfloat32"))
    with pytest.raises(RecipeError, match="rtn has no use for precision"):
        bitwright.plan(recipe.changed(method="rtn", epochs=None, precision="bfloat16"))
