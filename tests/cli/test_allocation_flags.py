"""``--scheme-for``, ``--allocation`` and the same keys in a recipe file."""

from pathlib import Path

import yaml
from tests.cli.conftest import Run

DOWN = "*.down_proj=W8A16"


def test_the_flag_is_repeatable_and_a_recipe_takes_a_mapping(run: Run, model: Path, tmp_path: Path) -> None:
    call = ("quantize", model, "--scheme", "W4A16g32", "--dry-run")
    says = "schemes of their own: W3A16 for 2 linears, W8A16 for 2 linears"
    ran = run(*call, "--scheme-for", DOWN, "--scheme-for", "*.o_proj=W3A16", "--json")
    assert says in ran.json["notes"]
    recipe = tmp_path / "recipe.yaml"
    for written in ({"*.o_proj": "W3A16", "*.down_proj": "W8A16"}, [DOWN, "*.o_proj=W3A16"]):
        recipe.write_text(yaml.safe_dump({"scheme_for": written}))
        assert says in run(*call, "--recipe", recipe, "--json").json["notes"]


def test_an_allocation_needs_no_scheme(run: Run, model: Path, tmp_path: Path) -> None:
    written = run("quantize", model, "--scheme", "W4A16g32", "--scheme-for", DOWN, "-o", tmp_path / "out")
    assert written.code == 0
    again = run("quantize", model, "--allocation", tmp_path / "out/allocation.json", "-o", tmp_path / "again")
    assert again.code == 0, again.err
    files = [tmp_path / name / "model.safetensors" for name in ("out", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    neither = run("quantize", model, "--dry-run")
    assert neither.code == 2 and "does not say which scheme" in neither.error


def test_inspect_counts_the_linears_of_each_scheme(run: Run, model: Path, tmp_path: Path) -> None:
    schemes = ["--scheme-for", "*.down_proj=W8A16g32", "--exclude", "*.0.self_attn.*"]
    ran = run("quantize", model, "--scheme", "W4A16g32", "--method", "rtn", *schemes, "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    shown = " ".join(run("inspect", tmp_path / "out").out.split())
    assert "scheme W4A16g32 (8), not quantized (5), W8A16g32 (2)" in shown
