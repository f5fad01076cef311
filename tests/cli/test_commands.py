"""The commands as they are typed: results, exit codes, what is printed where, paths, interruptions."""

import errno
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from huggingface_hub import constants
from tests.cli.conftest import SCHEME, TEXT, Ran, Run, change_config, change_tensors, tree
from tests.conftest import contents

from bitwright import api
from bitwright.api import demonstrating
from bitwright.cli import Interrupted
from bitwright.demo import texts

Refused = Callable[..., str]


@pytest.fixture
def quantize(run: Run, model: Path, tmp_path: Path) -> Run:
    """``quantize(flag, value, ...)``: quantizes the model into ``out``."""
    return lambda *flags: run("quantize", model, "--scheme", SCHEME, "-o", tmp_path / "out", *flags)


@pytest.fixture
def quantized(quantize: Run, tmp_path: Path) -> Path:
    """The model, quantized."""
    assert quantize().code == 0
    return tmp_path / "out"


class TestQuantize:
    def test_result(self, quantize: Run, tmp_path: Path) -> None:
        ran = quantize()
        assert ran.code == 0
        assert f"Wrote {tmp_path / 'out'}" in ran.out and "4.625" in ran.out
        assert "quantize 100%" in ran.err and "quantize 100%" not in ran.out
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]

    def test_json(self, quantize: Run, text: Path, tmp_path: Path) -> None:
        found = quantize("--json", "--method", "rtn", "--calibration", text, "--samples", 2, "--quantize-lm-head").json
        assert found["output"] == str(tmp_path / "out")
        assert (found["scheme"], found["method"], found["format"]) == (SCHEME, "rtn", "compressed-tensors")
        assert found["linears"] == 15 and found["bits_per_weight"] == 4.625
        assert 0 < found["output_error"] < 1
        weights = (tmp_path / "out" / "model.safetensors").stat().st_size
        assert found["bytes_out"] == weights < found["bytes_in"]
        assert found["resumed"] == 0 and found["fallbacks"] == []

    def test_plan_writes_nothing(self, quantize: Run, tmp_path: Path) -> None:
        before = tree(tmp_path)
        ran = quantize("--dry-run")
        assert ran.code == 0 and "nothing was written" in ran.out
        assert tree(tmp_path) == before

    def test_plan_as_json(self, quantize: Run, text: Path, tmp_path: Path) -> None:
        before = tree(tmp_path)
        found = quantize("--dry-run", "--json", "--calibration", text, "--samples", 2).json
        assert found["linears"] == 14 and found["blocks"] == 2
        assert found["calibration_tokens"] == 2 * 128
        assert found["memory_bytes"] > sum(found["memory"].values())
        assert tree(tmp_path) == before

    def test_overwrite_replaces_all_of_an_output(self, quantize: Run, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "old").write_text("old")
        assert quantize("--overwrite").code == 0
        assert "old" not in contents(tmp_path / "out") and "config.json" in contents(tmp_path / "out")

    def test_infinite_errors_are_null(self, quantize: Run, model: Path, text: Path, tmp_path: Path) -> None:
        change_tensors(model, lambda tensors: tensors["model.layers.0.self_attn.v_proj.weight"].mul_(1e30))
        ran = quantize("--json", "--calibration", text, "--samples", 1)
        assert ran.json["output_error"] is None
        json.loads((tmp_path / "out" / "bitwright.json").read_text(), parse_constant=lambda word: pytest.fail(word))


class TestPaths:
    @pytest.mark.parametrize("name", ["with space", "模型 ü", "[bold] [1]", "-dash", "a.b", 'it\'s "q"'])
    def test_names(self, run: Run, model: Path, tmp_path: Path, name: str) -> None:
        source, output = tmp_path / name, tmp_path / "result" / name
        model.rename(source)
        ran = run("quantize", f"{source}/", "--scheme", SCHEME, "-o", f"{output}/")
        lines = [line.rstrip() for line in ran.out.splitlines()]
        assert ran.code == 0 and f"Wrote {output}" in lines
        assert f"bitwright evaluate {shlex.quote(str(output))} --text FILE" in ran.out
        assert run("inspect", output, "--json").json["path"] == str(output)

    def test_relative(self, run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(model)
        assert run("quantize", ".", "--scheme", SCHEME, "-o", "../a/../out").code == 0
        assert (tmp_path / "out" / "config.json").is_file()

    def test_links(self, run: Run, model: Path, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(model)
        (tmp_path / "there").symlink_to(tmp_path / "disk")
        assert run("quantize", tmp_path / "link", "--scheme", SCHEME, "-o", tmp_path / "there").code == 0
        assert (tmp_path / "there").is_symlink() and (tmp_path / "disk" / "config.json").is_file()

    def test_home(self, run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.chdir(model)
        assert run("quantize", "~/model", "--scheme", SCHEME, "--output=~/out").code == 0
        assert (tmp_path / "out").is_dir() and not (model / "~").exists()


class TestExport:
    @pytest.mark.parametrize(("dtype", "format", "lines"), [
        ("float16", "gptq", ["linears 14, all exactly as they were"]),
        ("float32", "gptq", ["linears 14", "codes kept in 14, of which 14 have rounded scales or minima"]),
        ("float16", "dense", ["linears 14", "codes kept in 14, of which 14 have rounded weights"]),
    ])  # fmt: skip
    def test_what_was_kept(
        self, run: Run, tiny: Callable[..., Path], tmp_path: Path, dtype: str, format: str, lines: list[str]
    ) -> None:
        assert run("quantize", tiny(dtype), "--scheme", SCHEME, "--method", "rtn", "-o", tmp_path / "out").code == 0
        ran = run("export", tmp_path / "out", "--format", format, "-o", tmp_path / "again")
        found = [" ".join(line.split()) for line in ran.out.splitlines()]
        assert ran.code == 0 and [line for line in found if line.startswith(("linears", "codes kept"))] == lines

    def test_a_model_without_quantized_linears(self, run: Run, tiny: Callable[..., Path], tmp_path: Path) -> None:
        ran = run("export", tiny(eos_token_id=10), "--format", "gguf", "-o", tmp_path / "m.gguf")
        found = [" ".join(line.split()) for line in ran.out.splitlines()]
        assert ran.code == 0 and "linears no linear is quantized; written in 16 bits" in found
        assert "exactly" not in ran.out


class TestEvaluate:
    @pytest.fixture
    def evaluate(self, run: Run, quantized: Path, text: Path) -> Run:
        return lambda *flags: run("evaluate", quantized, "--text", text, "--windows", 3, *flags)

    def test_result(self, evaluate: Run, quantized: Path, model: Path) -> None:
        ran = evaluate("--reference", model)
        assert ran.code == 0 and "(3 windows of 128 tokens)" in ran.out and str(quantized) in ran.out

    def test_json(self, evaluate: Run, model: Path) -> None:
        found = evaluate("--reference", model, "--json").json
        measured = found["measurement"]
        assert (measured["windows"], measured["seqlen"], found["dtype"]) == (3, 128, "float32")
        assert measured["perplexity"] != measured["reference_perplexity"] and measured["kl_divergence"] > 0

    def test_the_model_against_itself(self, run: Run, model: Path, text: Path) -> None:
        found = run("evaluate", model, "--text", text, "--windows", 1, "--reference", model, "--json").json
        assert found["measurement"]["kl_divergence"] == 0 and found["measurement"]["top1_agreement"] == 1

    def test_no_number_is_null(self, run: Run, model: Path, text: Path) -> None:
        change_tensors(model, lambda tensors: tensors["lm_head.weight"].fill_(float("nan")))
        ran = run("evaluate", model, "--text", text, "--windows", 1, "--json")
        assert ran.json["measurement"]["perplexity"] is None

    @pytest.mark.parametrize(
        ("flag", "value", "says"),
        [
            ("--windows", 0, "0 windows asked for; --windows must be at least 1"),
            ("--windows", 36, "36 windows of 128 tokens need 4608 tokens"),
            ("--seqlen", 1, "--seqlen must be at least 2"),
            ("--seqlen", -1, "--seqlen must be at least 2"),
            ("--seqlen", 129, "longer than the model's own maximum of 128 tokens"),
            ("--dtype", "floot16", "no dtype 'floot16'; did you mean float16? Known: auto"),
            ("--device", "meta", "device 'meta'"),
            ("--text", "", "an empty name was given for the evaluation text"),
            ("--text", "./nothing.txt", "there is no text file"),
            ("--reference", "nobody/nothing", "hf download nobody/nothing"),
        ],
    )
    def test_bad_value(self, refused: Refused, model: Path, text: Path, flag: str, value: Any, says: str) -> None:
        assert says in refused("evaluate", model, "--text", text, flag, value)

    def test_text_too_short(self, refused: Refused, model: Path, tmp_path: Path) -> None:
        (tmp_path / "hi.txt").write_text("hi")
        message = refused("evaluate", model, "--text", tmp_path / "hi.txt")
        assert "need 128 tokens" in message and "has 2" in message

    def test_reference_of_another_vocabulary(
        self, refused: Refused, model: Path, tiny: Callable[..., Path], text: Path
    ) -> None:
        message = refused("evaluate", model, "--text", text, "--reference", tiny(vocab_size=300))
        assert "a vocabulary of 300, the model one of 256" in message

    def test_tokenizer_of_another_model(self, refused: Refused, model: Path, text: Path) -> None:
        tokenizer = json.loads((model / "tokenizer.json").read_text())
        tokenizer["model"]["vocab"] = {letter: 1000 + n for n, letter in enumerate(tokenizer["model"]["vocab"])}
        (model / "tokenizer.json").write_text(json.dumps(tokenizer))
        assert "256 rows" in refused("evaluate", model, "--text", text)

    @pytest.mark.parametrize("part", ["weight_packed", "weight_scale", "weight_zero_point", "weight_shape"])
    def test_folder_without_a_tensor(self, refused: Refused, quantized: Path, text: Path, part: str) -> None:
        change_tensors(quantized, lambda tensors: tensors.pop(f"model.layers.0.mlp.up_proj.{part}"))
        assert str(quantized) in refused("evaluate", quantized, "--text", text, "--windows", 1)

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
    def test_folder_without_a_file(self, refused: Refused, quantized: Path, text: Path, name: str) -> None:
        (quantized / name).unlink()
        assert str(quantized) in refused("evaluate", quantized, "--text", text)

    def test_unknown_quantization(self, refused: Refused, quantized: Path, text: Path) -> None:
        change_config(quantized, quantization_config={"quant_method": "fp8"})
        assert str(quantized) in refused("evaluate", quantized, "--text", text)


class TestInspect:
    def test_original(self, run: Run, model: Path) -> None:
        ran = run("inspect", model)
        assert ran.code == 0 and ran.err == "" and "16.000" in ran.out and "up_proj" not in ran.out

    def test_linears(self, run: Run, quantized: Path) -> None:
        ran = run("inspect", quantized, "--linears")
        assert ran.out.count("up_proj") == 2 and "W4A16g32" in ran.out

    def test_json(self, run: Run, quantized: Path) -> None:
        found = run("inspect", quantized, "--json").json
        assert found["quantization"] == "compressed-tensors pack-quantized" and found["scheme"] == SCHEME
        assert found["blocks"] == 2 and len(found["linears"]) == 15  # the output layer too

    @pytest.mark.parametrize(("place", "says"), [
        ("", "is no model folder: it has no config.json"), ("/", "is no model folder: it has no config.json"),
        ("text.txt", "text.txt: a file, no model folder"),
        ("model/model.safetensors", "model.safetensors: a file, no model folder"),
        ("nothing", "there is no such folder"),
    ])  # fmt: skip
    def test_no_model(self, refused: Refused, model: Path, text: Path, place: str, says: str) -> None:
        assert says in refused("inspect", text.parent / place)

    @pytest.mark.parametrize(
        "shape", [torch.tensor(5), torch.tensor([0, 0]), torch.tensor([-1, 64]), torch.tensor([1, 2, 3])], ids=str
    )
    def test_shape_that_lies(self, run: Run, quantized: Path, shape: torch.Tensor) -> None:
        name = "model.layers.0.mlp.up_proj.weight_shape"
        change_tensors(quantized, lambda tensors: tensors.update({name: shape}))
        ran = run("inspect", quantized)
        assert ran.code == 2 and ran.out == ""
        assert name.rpartition(".")[0] in ran.error and "weight_shape" in ran.error and "damaged" in ran.error

    @pytest.mark.parametrize("raw", [b"{", b"\xff", b"[]", b"[" * 10**5], ids=["cut", "bytes", "list", "deep"])
    def test_a_report_that_is_broken_is_passed_over(self, run: Run, quantized: Path, raw: bytes) -> None:
        (quantized / "bitwright.json").write_bytes(raw)
        assert run("inspect", quantized, "--json").json["scheme"] is None


class TestDemo:
    @pytest.fixture
    def small(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The demonstration with a model that takes no time."""
        for name, value in {
            "MODEL_DIR": model,
            "SCHEMES": (SCHEME,),
            "SEQLEN": 32,
            "WINDOWS": 2,
            "NEW_TOKENS": 2,
        }.items():
            monkeypatch.setattr(demonstrating, name, value)
        monkeypatch.setattr(texts, "evaluation_text", lambda: TEXT * 10)

    @pytest.mark.usefixtures("small")
    def test_result(self, run: Run) -> None:
        ran = run("demo")
        assert ran.code == 0 and f"rtn {SCHEME}" in ran.out and "original" in ran.out
        assert "2 windows of 32 tokens" in ran.out

    @pytest.mark.usefixtures("small")
    def test_json_and_folder(self, run: Run, tmp_path: Path) -> None:
        rows = run("demo", "-o", tmp_path / "kept", "--json").json["rows"]
        assert [row["scheme"] for row in rows] == ["16 bit", SCHEME]
        assert rows[0]["kl_divergence"] == 0 < rows[1]["kl_divergence"]
        assert [path.name for path in (tmp_path / "kept").iterdir()] == [SCHEME]

    @pytest.mark.usefixtures("small")
    def test_a_folder_that_exists_is_kept(
        self, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "mine" / SCHEME).mkdir(parents=True)
        monkeypatch.setattr(demonstrating, "evaluate", lambda *_, **__: pytest.fail("measured before the refusal"))
        assert "exists and is kept" in refused("demo", "-o", tmp_path / "mine")


class TestUsage:
    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["quantise"], "No such command 'quantise'. Did you mean 'quantize'?"),
            (["quantize", "m", "--shceme", "W4A16"], "No such option: --shceme (Possible options: "),
            (["quantize", "m", "--samples", "many"], "Invalid value for '--samples': "),
            (["quantize", "m", "--scheme"], "Option '--scheme' requires an argument."),
            (["quantize", "m", "n"], "unexpected extra argument(s) (n)"),
            (["quantize"], "which model?"),
            (["quantize", "m"], "which scheme: give --scheme"),
            (["evaluate"], "Missing argument 'folder'."),
            (["inspect"], "Missing argument 'path'."),
            (["verify"], "Missing argument 'folder'. For example: bitwright verify OUTPUT --against MODEL"),
            (["verify", "a", "b"], "extra argument(s) (b). For example: bitwright verify OUTPUT --against MODEL"),
            (["verify", "a", "--against"], "'--against' requires an argument. For example: bitwright verify OUTPUT"),
            (
                ["export", "a", "--format", "awq"],
                "'--output' / '-o'. For example: bitwright export OUTPUT --format gguf",
            ),
            (
                ["export", "a", "-o", "b"],
                "Missing option '--format'. For example: bitwright export OUTPUT --format gguf",
            ),
        ],
    )
    def test_mistakes(self, run: Run, arguments: list[str], says: str) -> None:
        ran = run(*arguments)
        assert ran.code == 2 and ran.out == "" and says in ran.err and "Traceback" not in ran.err

    def test_version(self, run: Run) -> None:
        assert run("--version") == Ran(0, f"bitwright {version('bitwright')}\n", "")

    @pytest.mark.parametrize("command", ["quantize", "export"])
    def test_help_of_files(self, run: Run, command: str) -> None:
        said = " ".join(run(command, "--help").out.replace("│", " ").split()).replace("- ", "-")
        assert "older or file" in said and "mlc-chat-config.json" in said and "not for gguf and mlc" in said
        assert "mlc: f16 (at 4 bits only)" in said

    @pytest.mark.parametrize("arguments", [[], ["-h"], ["quantize", "--help"]])
    def test_help(self, run: Run, arguments: list[str]) -> None:
        ran = run(*arguments)
        assert ran.code == 0 and "Usage: " in ran.out and ran.err == ""


class TestExitCodes:
    @pytest.fixture
    def inspect(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], Ran]:
        """``inspect(error)``: a command in which that error comes up."""

        def call(error: BaseException) -> Ran:
            def failing(_: Path, **__: object) -> NoReturn:
                raise error

            monkeypatch.setattr(api, "inspect", failing)
            return run("inspect", "model")

        return call

    def test_bug(self, inspect: Callable[..., Ran]) -> None:
        ran = inspect(AssertionError("impossible"))
        assert ran.code == 1 and ran.out == ""
        assert "Traceback" in ran.err and "AssertionError: impossible" in ran.err and "a bug in Bitwright" in ran.err

    @pytest.mark.parametrize(
        ("error", "says"),
        [
            (MemoryError(), "out of memory"),
            (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
            (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), "out of memory"),
            (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
            (PermissionError(errno.EACCES, "Permission denied", "/x"), "'/x'"),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_what_the_machine_refuses(self, inspect: Callable[..., Ran], error: Exception, says: str) -> None:
        ran = inspect(error)
        assert ran.code == 2 and says in ran.error

    def test_interrupted(self, inspect: Callable[..., Ran]) -> None:
        ran = inspect(Interrupted())
        assert ran.code == 130 and "interrupted" in ran.error

    def test_a_file_that_is_missing_is_no_excuse(self, inspect: Callable[..., Ran]) -> None:
        assert inspect(FileNotFoundError(errno.ENOENT, "No such file", "/x")).code == 1


def test_the_module_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "bitwright", "quantise"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "'quantize'" in ended.stderr and "Traceback" not in ended.stderr


def test_download_is_asked_for_each_model_that_is_named(
    model: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is here is not downloaded; what is not, is not downloaded if the network is out of bounds."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert run("quantize", model, "--scheme", "W8A16", "-o", tmp_path / "out", "--download").code == 0
    for command in (["inspect", "no/body"], ["verify", tmp_path / "out", "--against", "no/body"],
                    ["evaluate", tmp_path / "out", "--reference", "no/body"],
                    ["quantize", "no/body", "--scheme", "W8A16", "--dry-run"]):  # fmt: skip
        ran = run(*command, "--download")
        assert ran.code == 2 and "HF_HUB_OFFLINE forbids to download it" in ran.error
