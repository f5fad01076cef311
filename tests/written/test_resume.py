"""The same recipe gives the same bytes: twice, in another process, and whatever moment a run is killed at."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.checkpoint.conftest import Killed, stopping_at
from tests.conftest import Checkpoints, contents

import bitwright
from bitwright.core.errors import OutputError
from bitwright.core.progress import Progress
from bitwright.core.recipe import Recipe

UNITS = 2 + 1  # two blocks, the output layer
EVENTS = 4  # before each block, before the output layer, at the end


@pytest.fixture(scope="module")
def recipe(tiny: Checkpoints, text: Path) -> Recipe:
    """Everything at once: calibration text, an output layer of its own, several shards."""
    return Recipe(str(tiny()), "W3A16g32", calibration=str(text), samples=4, seqlen=32, quantize_lm_head=True,
                  shard_size="60KB")  # fmt: skip


@pytest.fixture(scope="module")
def whole(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the recipe gives when nothing interrupts it."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert bitwright.quantize(recipe, out).resumed == 0
    found = contents(out)
    assert len([name for name in found if name.endswith(".safetensors")]) > 1
    return found


def stop_at(event: int) -> Callable[[Progress], None]:
    """A listener that stops the run at an event of its main stage."""
    left = event

    def listen(progress: Progress) -> None:
        nonlocal left
        if (
            progress.stage == "quantize" and not progress.detail and not progress.resumed
        ):  # a unit begins, no part of one
            left -= 1
            if left < 0:
                raise Killed

    return listen


def partial(recipe: Recipe, out: Path, event: int = 1) -> None:
    """What is left of a run that was stopped at an event."""
    with pytest.raises(Killed):
        bitwright.quantize(recipe, out, listener=stop_at(event))
    assert not out.exists()
    assert out.with_name("out.partial").is_dir()


def test_twice_the_same(recipe: Recipe, whole: dict[str, bytes], tmp_path: Path) -> None:
    bitwright.quantize(recipe, tmp_path / "elsewhere")
    assert contents(tmp_path / "elsewhere") == whole


@pytest.mark.parametrize("event", range(EVENTS))
def test_a_run_that_was_stopped_goes_on(event: int, recipe: Recipe, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    partial(recipe, out, event)
    result = bitwright.quantize(recipe, out)
    assert result.resumed == event
    assert contents(out) == whole
    assert list(tmp_path.iterdir()) == [out]


def test_a_run_that_is_stopped_again_and_again(recipe: Recipe, whole: dict[str, bytes], tmp_path: Path) -> None:
    for event in range(EVENTS):
        partial(recipe, tmp_path / "out", event)
    assert bitwright.quantize(recipe, tmp_path / "out").resumed == UNITS
    assert contents(tmp_path / "out") == whole


def test_killed_at_file_operations_all_over_the_run(
    recipe: Recipe, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run gets some file operations further before the machine stops: into the blocks, the merge, the move."""
    out, states = tmp_path / "out", list[tuple[int, bool]]()
    while not out.exists():
        with stopping_at(10 + 3 * len(states), monkeypatch), suppress(Killed):
            bitwright.quantize(recipe, out)
        work = out.with_name("out.partial")
        states.append((len([*work.glob("part-*")]), (work / "merge.json").exists()))
        assert len(states) < 100, states
    assert contents(out) == whole
    assert len({parts for parts, merging in states if not merging}) >= 3, "stopped among the units"
    assert len([merging for _, merging in states if merging]) >= 3, "and in the middle of the merge"


KILLED = """
import json, os, signal, sys
from pathlib import Path
from bitwright.core.recipe import Recipe
from bitwright.api import quantize

recipe, folder = Recipe(**json.loads(sys.argv[1])), Path(sys.argv[2])
os_replace = os.replace

def in_a_child(moment):
    '''A run in a process of its own, which the system kills when a unit begins, or a file has been moved.'''
    def kill_if(reached):
        if moment == reached or isinstance(moment, str) and str(reached).startswith(moment):
            os.kill(os.getpid(), signal.SIGKILL)
    def replace(source, target):
        os_replace(source, target)
        kill_if(Path(target).name)
    def listen(progress):
        kill_if(progress.detail and f"{progress.unit} {progress.detail}")
        kill_if(progress.done if progress.stage == "quantize" else None)
    child = os.fork()
    if child == 0:
        out = folder / str(moment)
        os.replace = replace
        try:
            quantize(recipe, out, listener=listen)
        finally:
            os._exit(0 if out.exists() else 1)
    return os.waitpid(child, 0)[1]

for moment in json.loads(sys.argv[3]):
    assert os.WTERMSIG(in_a_child(moment)) == signal.SIGKILL, moment
assert in_a_child(-1) == 0
"""
MOMENTS = {1: 1, "part-00001": 1, "model-00002": 3, "config.json": 3}
"""How many units are recorded, and done again by nobody, after a kill at each of these moments."""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are killed in forks of one that has loaded torch")
def test_killed_by_the_system(recipe: Recipe, whole: dict[str, bytes], tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "12345"}
    arguments = [json.dumps(recipe.as_dict()), str(tmp_path), json.dumps([*MOMENTS])]
    command = [sys.executable, "-c", KILLED, *arguments]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert contents(tmp_path / "-1") == whole, "another process, another hash seed"
    for moment, resumed in MOMENTS.items():
        out = tmp_path / str(moment)
        assert not out.exists()
        assert bitwright.quantize(recipe, out).resumed == resumed, moment
        assert contents(out) == whole, moment


LEARNED_MOMENTS = {"model.layers.0 epoch 2": 0, "model.layers.1 epoch 1": 1, 2: 2, "model-00001": 2}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are killed in forks of one that has loaded torch")
def test_a_learned_run_killed_by_the_system(recipe: Recipe, tmp_path: Path) -> None:
    """In the middle of training a block: that block is trained anew, those before it are not."""
    recipe = recipe.changed(scheme="W4A4", method="omniquant", epochs=3, quantize_lm_head=False)
    arguments = [json.dumps(recipe.as_dict()), str(tmp_path), json.dumps([*LEARNED_MOMENTS])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, *arguments]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    whole = contents(tmp_path / "-1")
    for moment, resumed in LEARNED_MOMENTS.items():
        assert bitwright.quantize(recipe, tmp_path / str(moment)).resumed == resumed, moment
        assert contents(tmp_path / str(moment)) == whole, moment


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"scheme": "W4A16g32"}, "recipe.scheme: 'W3A16g32' -> 'W4A16g32'"),
        ({"seed": 1}, "recipe.seed: 0 -> 1"),
        ({"samples": 5}, "recipe.samples: 4 -> 5"),
        ({"format": "dense"}, "recipe.format: None -> 'dense'"),
        ({"quantize_lm_head": False}, "recipe.quantize_lm_head: True -> False"),
        ({"shard_size": "1GB"}, "recipe.shard_size: '60KB' -> '1GB'"),
        ({"calibration": None}, "calibration.seqlen: 32 -> (absent)"),
    ],
)
def test_a_changed_recipe_is_refused(
    changes: dict[str, Any],
    difference: str,
    recipe: Recipe,
    whole: dict[str, bytes],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    partial(recipe, out)
    before = contents(out.with_name("out.partial"))
    with pytest.raises(OutputError) as error:
        bitwright.quantize(replace(recipe, **changes), out)
    assert difference in str(error.value)
    assert "--restart" in str(error.value)
    assert contents(out.with_name("out.partial")) == before, "the work is kept as it was"
    assert bitwright.quantize(recipe, out).resumed == 1
    assert contents(out) == whole


def test_another_text_of_the_same_name_is_refused(recipe: Recipe, text: Path, tmp_path: Path) -> None:
    mine = tmp_path / "text.txt"
    mine.write_bytes(text.read_bytes())
    recipe = replace(recipe, calibration=str(mine))
    partial(recipe, tmp_path / "out")
    mine.write_text(mine.read_text().upper())
    with pytest.raises(OutputError, match=r"calibration\.tokens_sha256: '.*' -> '"):
        bitwright.quantize(recipe, tmp_path / "out")


def test_another_model_of_the_same_name_is_refused(tiny: Checkpoints, recipe: Recipe, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.symlink_to(tiny())
    partial(replace(recipe, model=str(model)), tmp_path / "out")
    model.unlink()
    model.symlink_to(tiny(attention_bias=True))
    with pytest.raises(OutputError, match=r"model\.model\.safetensors: '.* -> '"):
        bitwright.quantize(replace(recipe, model=str(model)), tmp_path / "out")


def test_a_model_that_was_written_to_is_refused(tiny: Checkpoints, recipe: Recipe, tmp_path: Path) -> None:
    """Wherever in its files: what identifies them reads samples only."""
    model = Path(shutil.copytree(tiny(), tmp_path / "model"))
    partial(replace(recipe, model=str(model)), tmp_path / "out")
    os.utime(model / "model.safetensors", (1, 1))
    with pytest.raises(OutputError, match=r"written\.model\.safetensors: '20.*' -> '1970-01-01 00:00:01"):
        bitwright.quantize(replace(recipe, model=str(model)), tmp_path / "out")


def test_a_model_and_a_text_that_have_moved_are_the_same(
    tiny: Checkpoints, recipe: Recipe, whole: dict[str, bytes], text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    partial(recipe, out, event=2)
    (tmp_path / "model").symlink_to(tiny())
    (tmp_path / "t.txt").write_bytes(text.read_bytes())
    moved = replace(recipe, model=str(tmp_path / "model"), calibration=str(tmp_path / "t.txt"))
    assert bitwright.quantize(moved, out).resumed == 2
    found = contents(out)
    different = {name for name in whole if found[name] != whole[name]}
    assert different == {"bitwright.json"}, "the account names the model as it was called"


def test_restart_begins_anew(recipe: Recipe, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    partial(replace(recipe, scheme="W4A16"), out, event=3)
    result = bitwright.quantize(recipe, out, restart=True)
    assert result.resumed == 0
    assert contents(out) == whole


def test_a_part_that_was_lost_is_made_again(recipe: Recipe, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    partial(recipe, out, event=2)
    parts = sorted(out.with_name("out.partial").glob("part-*"))
    assert len(parts) == 2
    parts[-2].unlink()
    bitwright.quantize(recipe, out)
    assert contents(out) == whole
