"""``bitwright engines``, and ``--engine`` on ``quantize``."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.conftest import Run


def test_the_table(run: Run) -> None:
    ran = run("engines")
    assert ran.code == 0
    for name in ("transformers", "vllm", "llama.cpp", "mlc", "gptqmodel"):
        assert f"{name}: " in ran.out
    assert "mlc: q, k, v and gate, up have to be quantized alike; " in ran.out
    assert "gptqmodel: 4 bits per channel" in ran.out and "gguf, checked with xllamacpp" in ran.out
    (llama,) = (line for line in ran.out.splitlines() if line.strip().startswith("llama.cpp ") or " gguf " in line)
    assert "multiples of 32" in llama
    assert "multiples of 32 or 40" in ran.out and "multiples of 128" in ran.out
    assert "dense too, as any folder" in ran.out


def test_json(run: Run) -> None:
    found = {engine["name"]: engine for engine in run("engines", "--json").json}
    (gguf,) = found["llama.cpp"]["ways"]
    assert gguf["format"] == "gguf" and 8 in gguf["symmetric"] and 8 not in gguf["asymmetric"]
    assert not (gguf["activations"] or gguf["cache"] or gguf["outliers"] or gguf["per_input"])
    assert all(way["checked"] for engine in found.values() for way in engine["ways"])
    assert gguf["groups"] is None and gguf["multiples"] == [32] and "gptq" in found["transformers"]["also"]
    assert all(way["inputs"] == way["outputs"] == 32 for way in found["vllm"]["ways"])


@pytest.mark.parametrize("arguments", [("engines",), ("engines", "--json"), ("--help",), ("quantize", "--help")])
def test_an_output_that_nobody_reads_ends_quietly(arguments: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "bitwright", *arguments]
    ran = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (ran.returncode, ran.stderr) == (141, "")


def test_a_pipe_of_our_own_that_breaks_is_a_bug(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise BrokenPipeError

    monkeypatch.setattr("bitwright.api.engines", broken)
    monkeypatch.setattr("bitwright.cli.entry._silenced", lambda: False)
    ran = run("engines")
    assert ran.code == 1 and "this is a bug" in ran.err


def test_several_engines(run: Run, model: Path) -> None:
    ran = run(
        "quantize", model, "--scheme", "W4A16g32", "--engine", "vllm", "--engine", "gptqmodel", "--dry-run", "--json"
    )
    assert ran.code == 0 and ran.json["format"] == "awq"


def test_engines_in_a_recipe(run: Run, model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {model}\nscheme: W4A16g32\nengines: [vllm, gptqmodel]\n")
    assert run("quantize", "--recipe", recipe, "--dry-run", "--json").json["format"] == "awq"
    flag = run("quantize", "--recipe", recipe, "--engine", "gptqmodel", "--dry-run", "--json")
    assert flag.json["format"] == "gptq"


def test_refused_before_any_work(refused: Callable[..., str], model: Path, tmp_path: Path) -> None:
    said = refused("quantize", model, "--scheme", "W3A16", "--engine", "vllm", "-o", tmp_path / "out")
    assert "vllm cannot run scheme W3A16" in said and "nearest scheme that it runs is W4A16;" in said
