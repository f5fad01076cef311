"""``bitwright engines``, and ``--engine`` on ``quantize``."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.conftest import Run

import bitwright.engines
from bitwright import api
from bitwright.core.engine import engine_named

FAKE = """
from bitwright.core.engine import Engine, Way

ENGINE = Engine(
    name="fake.engine",
    ways=(
        Way(
            format="awq",
            symmetric=(),
            asymmetric=(4,),
            groups=(64,),
            channel=False,
            models=None,
            checked="fake 1.2.3: nothing was run",
        ),
    ),
    note="made up for a test",
)
"""
"""All that a new engine takes: a file in ``engines/``."""


@pytest.fixture
def fake(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a new engine, and beside it of a file that is none; both as if they lay in ``engines/``."""
    folder = tmp_path_factory.mktemp("engines")
    (folder / "fake_engine.py").write_text(FAKE)
    (folder / "no_engine.py").write_text("ENGINE = 'no engine'")
    monkeypatch.setattr(bitwright.engines, "__path__", [*bitwright.engines.__path__, str(folder)])
    monkeypatch.delitem(sys.modules, "bitwright.engines.fake_engine", raising=False)
    monkeypatch.delitem(sys.modules, "bitwright.engines.no_engine", raising=False)
    return folder


def test_a_new_engine_is_one_file(run: Run, refused: Callable[..., str], fake: Path, model: Path) -> None:
    table = run("engines")
    assert (
        "fake.engine: made up for a test" in table.out and "awq, checked with fake 1.2.3: nothing was run" in table.out
    )
    assert "fake.engine" in [engine["name"] for engine in run("engines", "--json").json]
    quantize = ("quantize", model, "--engine", "fake.engine", "--dry-run", "--json")
    assert run(*quantize, "--scheme", "W4A16g64").json["format"] == "awq"
    message = refused(*quantize, "--scheme", "W3A16g128")
    assert "fake.engine cannot run scheme W3A16g128: in awq it does not run 3-bit asymmetric weights" in message
    assert "The nearest scheme that it runs is W4A16g64;" in message
    message = refused("bench", model, "--engine", "fake.engine")
    assert "bench measures in llama.cpp and transformers, not in fake.engine" in message


def test_a_new_engine_quantizes(run: Run, fake: Path, model: Path, tmp_path: Path) -> None:
    ran = run("quantize", model, "--scheme", "W4A16g64", "--engine", "fake.engine", "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "awq"


def test_a_new_engine_is_in_the_help(fake: Path) -> None:
    begin = (
        f"import bitwright.engines; bitwright.engines.__path__.append({str(fake)!r}); from bitwright.cli import main"
    )
    command = [sys.executable, "-c", f"{begin}; main()", "quantize", "--help"]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})
    assert "fake.engine, gptqmodel, llama.cpp, mlc, transformers, vllm" in " ".join(ran.stdout.split()), ran.stderr


def test_a_file_is_named_after_its_engine() -> None:
    files = [path.stem for path in Path(bitwright.engines.__file__ or "").parent.glob("[!_]*.py")]
    named = {engine.name.replace(".", "_"): engine for engine in api.engines()}
    assert sorted(files) == sorted(named)
    assert engine_named("llama.cpp") is named["llama_cpp"]


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
    assert "gguf: one model may mix schemes from linear to linear and linears in full precision\n" in ran.out
    assert "awq: one model may mix linears in full precision; experts of one layer alike\n" in ran.out
    assert "mlc: all linears have one scheme\n" in ran.out


def test_json(run: Run) -> None:
    found = {engine["name"]: engine for engine in run("engines", "--json").json}
    (gguf,) = found["llama.cpp"]["ways"]
    assert gguf["format"] == "gguf" and 8 in gguf["symmetric"] and 8 not in gguf["asymmetric"]
    assert not (gguf["activations"] or gguf["cache"] or gguf["outliers"] or gguf["per_input"])
    assert all(way["checked"] for engine in found.values() for way in engine["ways"])
    assert gguf["groups"] is None and gguf["multiples"] == [32] and "gptq" in found["transformers"]["also"]
    assert all(way["inputs"] == way["outputs"] == 32 for way in found["vllm"]["ways"])
    assert [way["mixes"] for way in found["vllm"]["ways"]] == [True, False, True]
    assert {way["experts"] for way in found["vllm"]["ways"]} == {"layer"} and found["mlc"]["fused"] is True
    assert found["llama.cpp"]["bench"] == "gguf" and found["vllm"]["bench"] is None


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


def test_a_panic_of_a_library_in_rust_is_a_bug(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """What pyo3 raises; it is no Exception."""

    def panics() -> None:
        raise PanicException

    monkeypatch.setattr("bitwright.api.engines", panics)
    ran = run("engines")
    assert ran.code == 1 and "this is a bug" in ran.err
