"""Words that help: what a message proposes can be done, and can be pasted into a shell."""

import io
import json
import shlex
from pathlib import Path

import pytest
from rich.console import Console
from tests.cli.conftest import SCHEME, Run, change_config, change_tensors

from bitwright.core.engine import engines
from bitwright.core.progress import Progress
from bitwright.report import engines_screen, screens
from bitwright.report.progress import ProgressReport


def test_an_adapter_is_to_be_merged(run: Run, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    ran = run("quantize", tmp_path / "adapter", "--scheme", SCHEME, "-o", tmp_path / "o")
    assert ran.code == 2 and "Merge the adapter into its base model" in ran.error and "merge_and_unload()" in ran.error


def test_a_model_with_an_adapter_that_is_not_merged(run: Run, model: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    change_tensors(model, lambda tensors: tensors.update({f"{name}.base_layer.weight": tensors.pop(f"{name}.weight")}))
    ran = run("quantize", model, "--scheme", SCHEME, "--calibration", "builtin", "-o", tmp_path / "o")
    assert ran.code == 2 and "Merge the adapter" in ran.error and "download" not in ran.error


def test_an_unknown_architecture(run: Run, model: Path, tmp_path: Path) -> None:
    change_config(model, model_type="nobody_knows")
    ran = run("quantize", model, "--scheme", SCHEME, "--calibration", "builtin", "-o", tmp_path / "o")
    assert "has no architecture 'nobody_knows'" in ran.error and "Update transformers" in ran.error
    assert "--method rtn or --method easyquant, without --calibration" in ran.error and "families/" not in ran.error


def test_a_command_that_is_proposed_can_be_pasted(run: Run, model: Path, tmp_path: Path) -> None:
    odd = model.rename(tmp_path / "my * model")
    message = run("bench", odd, "--engine", "llama.cpp").error
    assert f"bitwright export {shlex.quote(str(odd))} --format gguf --output 'my * model.gguf'" in message
    assert "hf download 'org/my * model' --local-dir 'my * model'" in run(
        "quantize", "org/my * model", "--scheme", SCHEME, "-o", tmp_path / "o").error  # fmt: skip


@pytest.mark.parametrize("width", [80, 100, 300])
def test_engines_break_no_word(width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    engines_screen.engines(console, engines())
    assert isinstance(console.file, io.StringIO)
    words = console.file.getvalue().replace("│", " ").split()
    assert "compressed-tensors" in words and "transformers" in words and "activations," in words


def test_lines_in_a_pipe_are_few() -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=False)
    with ProgressReport(console) as report:
        for done in range(301):
            report(Progress("verify", done, 300, f"tensor {done}"))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 10 and lines[-1].startswith("verify 300/300")


def test_a_short_stage_is_one_line_in_a_pipe() -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=False)
    with ProgressReport(console) as report:
        for done in range(13):
            report(Progress("write", done, 12, f"tensor {done}"))
    assert isinstance(console.file, io.StringIO)
    assert [line[:11] for line in console.file.getvalue().splitlines()] == ["write 12/12"]


@pytest.mark.parametrize(("count", "words"), [(1, "1 part was"), (2, "2 parts were")])
def test_parts_are_counted(count: int, words: str) -> None:
    assert screens._continued(count) == f"{words} finished before"


@pytest.mark.parametrize(("line", "says"), [
    ("scheme: 2026-13-45", "'2026-13-45' is no scheme"),
    ("seed: 2026-01-01", "seed"),
    ('scheme: !!timestamp "x"', "'x' is no scheme"),
    ('method: rtn\nseed: !!bool "x"', "line 3: 'x' is no bool"),
    ('method: rtn\nseed: !!int "x"', "line 3: 'x' is no int: invalid literal"),
])  # fmt: skip
def test_values_of_a_recipe_that_are_none(line: str, says: str, run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"model: {model}\n{line}\n")
    ran = run("quantize", "--recipe", tmp_path / "r.yaml", "-o", tmp_path / "o")
    assert ran.code == 2 and says in ran.error and "bug" not in ran.error


def test_a_narrow_terminal_keeps_the_time_that_is_left() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    report = ProgressReport(console)
    assert report._bars is not None
    step = Progress("quantize", 1, 4, "model.layers.1", 2**33, 0.5, "training epoch 3 of 20, a step with a long name")
    report(step)
    console.print(report._bars.get_renderable())
    assert isinstance(console.file, io.StringIO)
    assert "-:--:--" in console.file.getvalue() and " 38%" in console.file.getvalue()


def test_a_run_that_goes_on_says_so(run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitwright.stream.parts import PartWriter

    write, calls = PartWriter.write, []

    def stop_at_the_second(self: PartWriter, *arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 2:
            raise MemoryError
        return write(self, *arguments)  # type: ignore[arg-type]

    command: tuple[object, ...] = (
        "quantize",
        model,
        "--scheme",
        SCHEME,
        "--method",
        "gptq",
        "--calibration",
        "builtin",
        "--samples",
        2,
    )
    command += ("-o", tmp_path / "o", "--seqlen", 32)
    with monkeypatch.context() as patched:
        patched.setattr(PartWriter, "write", stop_at_the_second)
        assert run(*command).code == 2
    ran = run(*command, "--json")
    assert ran.code == 0 and "going on: 1 of 2 blocks were finished before" in ran.err
    assert json.loads(ran.out)["resumed"] == 1
