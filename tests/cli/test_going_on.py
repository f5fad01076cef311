"""Runs that were stopped, by the user, the machine or a full disk, and what the same command makes of them."""

import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.cli.conftest import SCHEME, Run, change_config, change_tensors, tree
from tests.conftest import contents

from bitwright.cli import Interrupted
from bitwright.stream.parts import Part
from bitwright.written.sink import Sink


@contextmanager
def files_of_at_most(nbytes: int) -> Iterator[None]:
    """What a disk does that fills up: a file cannot grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestGoingOn:
    """A run that stopped continues, to the same bytes as one that did not."""

    UNITS = 3  # output layer, embedding, norm: each of them fits where a block does not
    HEAD_BYTES = 256 * 64 * 2

    @pytest.fixture
    def whole(self, run: Run, model: Path, tmp_path: Path) -> dict[str, bytes]:
        assert run("quantize", model, "--scheme", "W8A16", "-o", tmp_path / "whole").code == 0
        return contents(tmp_path / "whole")

    @pytest.fixture
    def begun(self, run: Run, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """The output of a run that was interrupted after its first block."""
        with monkeypatch.context() as patched:
            stop_after_a_block(patched, Interrupted)
            flags = ("--calibration", text, "--samples", 2)
            assert run("quantize", model, "--scheme", SCHEME, "-o", tmp_path / "out", *flags).code == 130
        assert not (tmp_path / "out").exists()
        return tmp_path / "out"

    @pytest.fixture
    def again(self, run: Run, model: Path, text: Path, begun: Path) -> Run:
        """The same command, with other flags after it."""
        flags = ("--scheme", SCHEME, "-o", begun, "--calibration", text, "--samples", 2, "--json")
        return lambda *more: run("quantize", model, *flags, *more)

    def test_after_a_full_disk(self, run: Run, model: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
        command = ("quantize", model, "--scheme", "W8A16", "-o", tmp_path / "out", "--json")
        with files_of_at_most(self.HEAD_BYTES + 4096):
            ran = run(*command)
        assert ran.code == 2 and "out.partial" in ran.error and "repeat the command" in ran.error
        assert not (tmp_path / "out").exists()
        assert not list((tmp_path / "out.partial" / "result").iterdir())
        assert run(*command).json["resumed"] == self.UNITS
        assert contents(tmp_path / "out") == whole

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
    def test_after_a_signal(
        self, run: Run, model: Path, whole: dict[str, bytes], tmp_path: Path, number: signal.Signals
    ) -> None:
        command = ["quantize", str(model), "--scheme", "W8A16", "--output", str(tmp_path / "out")]
        ended = subprocess.run(
            [sys.executable, "-c", SIGNALLED.format(number=int(number)), *command],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert ended.returncode == (130 if number == signal.SIGINT else -number)
        assert ended.stdout == "" and "Traceback" not in ended.stderr
        assert ("error: interrupted" in ended.stderr) == (number == signal.SIGINT)
        assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").is_dir()
        finished = len((tmp_path / "out.partial" / "journal.jsonl").read_text().splitlines()) - 1
        assert 1 <= finished <= self.UNITS + 1  # the first block, and what another thread had copied by then
        assert run(*command, "--json").json["resumed"] == finished
        assert contents(tmp_path / "out") == whole

    def test_with_what_the_first_run_left(self, again: Run, begun: Path) -> None:
        assert again().json["resumed"] == 1
        assert not begun.with_name("out.partial").exists()

    def test_other_flags_are_refused(self, again: Run, begun: Path) -> None:
        before = tree(begun.with_name("out.partial"))
        ran = again("--scheme", "W3A16g32", "--seed", 1)
        assert ran.code == 2 and "begun with other settings" in ran.error
        assert "scheme: 'W4A16g32' -> 'W3A16g32'" in ran.error and "seed: 0 -> 1" in ran.error
        assert "--restart" in ran.error
        assert tree(begun.with_name("out.partial")) == before
        assert again("--scheme", "W3A16g32", "--restart").json["scheme"] == "W3A16g32"

    def test_other_weights_are_refused(self, again: Run, model: Path) -> None:
        change_tensors(model, lambda tensors: tensors["lm_head.weight"].mul_(2))
        error = again().error
        assert "begun from other files of the model" in error and "settings" not in error
        assert "put these back as they were" in error and "--restart" in error

    def test_another_config_is_refused(self, again: Run, model: Path) -> None:
        change_config(model, rms_norm_eps=1e-5)
        error = again().error
        assert "config.json has other contents (model.config.json: 'sha256" in error and "settings" not in error

    def test_other_sidecar_files_are_refused(self, again: Run, model: Path) -> None:
        (model / "chat_template.jinja").write_text("{{ messages }}")
        error = again().error
        assert "chat_template.jinja was not there (beside_the_weights.chat" in error and "settings" not in error

    def test_other_files_and_other_flags_are_both_said(self, again: Run, model: Path) -> None:
        change_config(model, rms_norm_eps=1e-5)
        error = again("--seed", 1).error
        assert "begun from other files of the model than are there now and with other settings:" in error
        assert "put these back as they were and repeat" in error and "with the old settings" in error

    def test_another_text_is_refused(self, again: Run, text: Path) -> None:
        text.write_text("Something else. " * 1000)
        error = again().error
        assert "begun with other calibration data:" in error and "calibration.tokens_sha256" in error

    def test_an_equal_model_elsewhere_is_the_same(self, run: Run, model: Path, text: Path, begun: Path) -> None:
        moved = model.rename(model.with_name("moved"))
        flags = ("--calibration", text, "--samples", 2, "--json")
        assert run("quantize", moved, "--scheme", SCHEME, "-o", begun, *flags).json["resumed"] == 1

    def test_a_damaged_part_is_made_again(self, again: Run, begun: Path) -> None:
        part = max(begun.with_name("out.partial").glob("part-*.safetensors"))
        part.write_bytes(b"\xff" * part.stat().st_size)
        assert again().json["resumed"] == 0


def stop_after_a_block(monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    """Raises as soon as the first block is written and noted."""
    note = Sink.note

    def stopping(self: Sink, part: Part) -> None:
        note(self, part)
        raise error

    monkeypatch.setattr(Sink, "note", stopping)


SIGNALLED = """
import os, time
from bitwright.written.sink import Sink
from bitwright.cli import main

note = Sink.note

def stopping(self, part):
    note(self, part)
    if part.report is not None:
        os.kill(os.getpid(), {number})
        time.sleep(2)  # the signal is for the main thread

Sink.note = stopping
main()
"""
