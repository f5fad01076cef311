"""Nothing lost: a run that is killed continues, and its result is the same bytes; other settings are refused."""

import hashlib
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tests.conftest import Checkpoints

import bitwright
from bitwright.api.quantizing import TIMINGS
from bitwright.core.errors import OutputError
from bitwright.core.progress import Progress

TEXT = "".join(f"{n} green bottles hanging on the wall, " for n in range(200))


class Killed(BaseException):
    """Stands for whatever ends a run in the middle."""


def digest(folder: Path) -> dict[str, str]:
    """Every file of a result but the timings, which differ from run to run."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != TIMINGS]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def recipe(tiny: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> bitwright.Recipe:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(TEXT)
    return bitwright.Recipe(
        model=str(tiny()),
        scheme="W3A16g32",
        method="rtn",
        calibration=str(text),
        samples=4,
        seqlen=64,
        shard_size="40KB",
    )


@pytest.fixture(scope="module")
def undisturbed(recipe: bitwright.Recipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    bitwright.quantize(recipe, output)
    return digest(output)


def test_the_same_recipe_gives_the_same_bytes(
    recipe: bitwright.Recipe, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    bitwright.quantize(recipe, tmp_path / "out")
    assert digest(tmp_path / "out") == undisturbed
    assert len([name for name in undisturbed if name.startswith("model-")]) > 2


@pytest.mark.parametrize("moment", range(4))
def test_stopped_anywhere_it_goes_on(
    recipe: bitwright.Recipe, undisturbed: dict[str, str], tmp_path: Path, moment: int
) -> None:
    seen = []

    def stop(progress: Progress) -> None:
        if progress.stage == "quantize":
            seen.append(progress)
            if len(seen) == moment + 1:
                raise Killed

    output = tmp_path / "out"
    if moment < 3:
        with pytest.raises(Killed):
            bitwright.quantize(recipe, output, listener=stop)
        assert not output.exists()
    result = bitwright.quantize(recipe, output)
    assert digest(output) == undisturbed
    assert (result.resumed > 0) == (moment < 3)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("after", ["part-00002", "model-00002", "config.json"])
def test_kill_9_and_again_gives_the_same_bytes(
    recipe: bitwright.Recipe, undisturbed: dict[str, str], tmp_path: Path, after: str
) -> None:
    """A real SIGKILL, at the moment a certain file has been moved into its place."""
    output = tmp_path / "out"
    program = f"""
import os, signal
import bitwright
real = os.replace
def replace(source, target):
    real(source, target)
    if {after!r} in str(target):
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace
bitwright.quantize(bitwright.Recipe(**{recipe.as_dict()!r}), {str(output)!r})
"""
    ended = subprocess.run([sys.executable, "-c", program], env=os.environ, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not output.exists()
    assert bitwright.quantize(recipe, output).resumed > 0
    assert digest(output) == undisturbed


def test_other_settings_are_refused_with_the_difference(recipe: bitwright.Recipe, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.done == 1 and progress.stage == "quantize":
            raise Killed

    with pytest.raises(Killed):
        bitwright.quantize(recipe, tmp_path / "out", listener=stop)
    other = replace(recipe, scheme="W4A16g32")
    with pytest.raises(OutputError, match=r"recipe\.scheme: 'W3A16g32' -> 'W4A16g32'(?s:.*)--restart"):
        bitwright.quantize(other, tmp_path / "out")
    assert bitwright.quantize(other, tmp_path / "out", restart=True).resumed == 0
