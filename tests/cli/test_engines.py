"""``bitwright engines``, and ``--engine`` on ``quantize``."""

from collections.abc import Callable
from pathlib import Path

from tests.cli.conftest import Run


def test_the_table(run: Run) -> None:
    ran = run("engines")
    assert ran.code == 0
    for name in ("transformers", "vllm", "llama.cpp", "mlc", "gptqmodel"):
        assert f"{name}: " in ran.out
    assert "mlc: q, k, v and gate, up have to be quantized alike; " in ran.out
    assert "gptqmodel: 4 bits per channel" in ran.out and "gguf, checked with xllamacpp" in ran.out


def test_json(run: Run) -> None:
    found = {engine["name"]: engine for engine in run("engines", "--json").json}
    (gguf,) = found["llama.cpp"]["ways"]
    assert gguf["format"] == "gguf" and 8 in gguf["symmetric"] and 8 not in gguf["asymmetric"]
    assert not (gguf["activations"] or gguf["cache"] or gguf["outliers"] or gguf["per_input"])
    assert all(way["checked"] for engine in found.values() for way in engine["ways"])


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
