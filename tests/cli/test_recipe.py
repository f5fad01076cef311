"""A YAML recipe says the same as the flags."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.cli.conftest import SCHEME, Run
from tests.conftest import contents

Refused = Callable[..., str]
Write = Callable[..., Path]


@pytest.fixture
def write(model: Path, tmp_path: Path) -> Write:
    """``write(samples=3, ...)``: a recipe for the model with these keys more; None leaves one out."""

    def to_file(**keys: Any) -> Path:
        path = tmp_path / "recipe.yaml"
        written = {"model": str(model), "scheme": SCHEME, "output": str(tmp_path / "out")} | keys
        path.write_text(yaml.safe_dump({key: value for key, value in written.items() if value is not None}))
        return path

    return to_file


def test_the_same_as_the_flags(run: Run, write: Write, model: Path, text: Path, tmp_path: Path) -> None:
    keys = {
        "method": "rtn",
        "format": "dense",
        "calibration": str(text),
        "samples": 3,
        "seqlen": 64,
        "seed": 7,
        "quantize_lm_head": True,
        "shard_size": "50KB",
    }
    assert run("quantize", "--recipe", write(**keys)).code == 0
    flags = [
        part
        for key, value in keys.items()
        for part in ([f"--{key.replace('_', '-')}"] if value is True else [f"--{key.replace('_', '-')}", value])
    ]
    assert run("quantize", model, "--scheme", SCHEME, "-o", tmp_path / "flags", *flags).code == 0
    from_recipe = contents(tmp_path / "out")
    assert from_recipe == contents(tmp_path / "flags")
    assert len([name for name in from_recipe if name.endswith(".safetensors")]) > 1


def test_hyphens(run: Run, write: Write) -> None:
    assert run("quantize", "--recipe", write(**{"quantize-lm-head": True}), "--dry-run", "--json").json["linears"] == 15


def test_flags_win(run: Run, write: Write, model: Path, tmp_path: Path) -> None:
    recipe = write(model="nowhere", scheme="W8A16", quantize_lm_head=True, output=str(tmp_path / "no"))
    flags = ("--scheme", "W3A16", "--no-quantize-lm-head", "-o", tmp_path / "yes")
    found = run("quantize", model, "--recipe", recipe, *flags, "--json").json
    assert (found["scheme"], found["linears"], found["output"]) == ("W3A16", 14, str(tmp_path / "yes"))
    assert not (tmp_path / "no").exists()


def test_home(run: Run, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run("quantize", "--recipe", write(model="~/model", output="~/out")).code == 0
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("shceme", "scheme"), ("methode", "method"), ("outptu", "output"), ("shard-sise", "shard_size"), ("Seed", "seed")],
)
def test_unknown_key(refused: Refused, write: Write, key: str, nearest: str) -> None:
    message = refused("quantize", "--recipe", recipe := write(**{key: "x"}))
    assert f"{recipe}: there is no key '{key.replace('-', '_')}'; did you mean {nearest}? Known: " in message


@pytest.mark.parametrize(
    ("key", "value", "takes"),
    [
        ("samples", "3", "int"),
        ("samples", 1.5, "int"),
        ("samples", True, "int"),
        ("seed", "1e3", "int"),
        ("seed", [1], "int"),
        ("seqlen", "long", "int or nothing"),
        ("scheme", 4, "str"),
        ("method", ["rtn"], "str"),
        ("format", False, "str"),
        ("calibration", 5, "str or nothing"),
        ("shard_size", 5, "str"),
        ("quantize_lm_head", "yes", "bool"),
        ("quantize_lm_head", 1, "bool"),
        ("model", 5, "str"),
        ("output", 5, "the path of a folder"),
        ("output", ["a"], "the path of a folder"),
    ],
)
def test_wrong_type(refused: Refused, write: Write, key: str, value: Any, takes: str) -> None:
    assert f"key '{key}' is {value!r}; it takes {takes}" in refused("quantize", "--recipe", write(**{key: value}))


@pytest.mark.parametrize(
    ("key", "says"), [("model", "which model?"), ("scheme", "which scheme"), ("output", "--output DIR")]
)
def test_missing_key(refused: Refused, write: Write, key: str, says: str) -> None:
    assert says in refused("quantize", "--recipe", write(**{key: None}))


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "holds no keys"),
        (b"- a\n- b\n", "holds no keys"),
        (b"scheme", "holds no keys"),
        (b"{}", "holds no keys"),
        (b"scheme: [", "cannot be read as YAML"),
        (b"\xff\xfe\xff", "cannot be read as YAML"),
        (b"scheme: W4A16\nscheme: W3A16\n", "the key 'scheme' stands twice"),
        (b"shard-size: 1GB\nshard_size: 2GB\n", ", line 2: the key 'shard_size' stands twice (as shard_size and"),
        (b"a: b\n---\nc: d\n", "cannot be read as YAML"),
        (b"? [a, b]\n: c\n", "cannot be read as YAML"),
        (b"seed: " + b"9" * 5000, ", line 1: '9999"),
        (b"[" * 500, "nested too deeply"),
        (b"!!python/object/apply:os.getcwd []", "cannot be read as YAML"),
    ],
    ids=[
        "empty",
        "list",
        "text",
        "no keys",
        "cut",
        "bytes",
        "twice",
        "twice by hyphen",
        "two",
        "odd",
        "long",
        "deep",
        "tag",
    ],
)
def test_no_recipe(refused: Refused, tmp_path: Path, raw: bytes, says: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(raw)
    message = refused("quantize", "--recipe", recipe)
    assert f"recipe {recipe}" in message and says in message


def test_no_file(refused: Refused, tmp_path: Path) -> None:
    assert "No such file" in refused("quantize", "--recipe", tmp_path / "nothing.yaml")
    assert "Is a directory" in refused("quantize", "--recipe", tmp_path)


@pytest.mark.parametrize("patterns", [["*.v_proj", "*.down_proj"], "*.v_proj,*.down_proj"])
def test_patterns_and_how_to_run(run: Run, write: Write, tmp_path: Path, patterns: Any) -> None:
    ran = run("quantize", "--recipe", write(exclude=patterns, include="lm_head", workers=1, max_memory="4GB"), "--json")
    assert ran.code == 0 and ran.json["linears"] == 2 * 5 + 1


@pytest.mark.parametrize(
    ("keys", "says"), [({"workers": "two"}, "workers is 'two'"), ({"max_memory": 5}, "'5' is no size")]
)
def test_how_to_run_wrongly(refused: Refused, write: Write, keys: dict[str, Any], says: str) -> None:
    assert says in refused("quantize", "--recipe", write(**keys))


QUOTES = r"line 3: YAML takes a text that begins with \* for an alias; put patterns in quotes: '\*\.down_proj'$"


@pytest.mark.parametrize(("written", "says"), [
    ("scheme-for: [{'*.down_proj': W8A16}]", r"'scheme_for' has {'\*\.down_proj': 'W8A16'} in it; write each as"),
    ("scheme-for: {'*.down_proj': 8}", r"'scheme_for' has {'\*\.down_proj': 8} in it; .*'\*\.down_proj': W8A16g128$"),
    ("scheme-for: {'*.down_proj': }", r"'scheme_for' has {'\*\.down_proj': None} in it; write"),
    ("exclude: [{'*.down_proj': true}]", r"'exclude' has {'\*\.down_proj': True} in it; write a list of texts"),
    ("exclude: [null]", r"'exclude' has None in it; write a list of texts"),
    ("scheme-for:", r"key 'scheme_for' is empty; leave it out, or write .*scheme_for: {'\*\.down_proj': W8A16g128}"),
    ("exclude:", r"key 'exclude' is empty; leave it out, or write a pattern, exclude: '\*\.down_proj', or a list"),
    ("include: []", r"key 'include' is empty; leave it out"), ("exclude: ''", r"key 'exclude' is empty; leave it out"),
    ("exclude: *.down_proj", QUOTES), ("exclude: *down_proj", QUOTES), ("exclude: [*]", QUOTES),
    ("scheme-for: {*.down_proj: W8A16}", QUOTES),
])  # fmt: skip
def test_patterns_that_are_none(refused: Refused, model: Path, tmp_path: Path, written: str, says: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {model}\nscheme: W4A16g32\n{written}\n")
    assert re.search(says, refused("quantize", "--recipe", recipe, "-o", tmp_path / "out").strip(), re.DOTALL)


def test_null_is_no_pattern(run: Run, model: Path, tmp_path: Path) -> None:
    """As a recipe that was written down from ``bitwright.json`` has it."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {model}\nscheme: W4A16g32\nexclude: null\nscheme-for: null\n")
    assert run("quantize", "--recipe", recipe, "--dry-run", "--json").json["linears"] == 14


TWICE = "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
MERGED = "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 60))


@pytest.mark.parametrize(("written", "says"), [
    (f"a0: &a0 [1, 1]\n{TWICE}", "stands for endlessly many values, its aliases (*name) written out"),
    (f"a0: &a0 {{x: 1}}\n{MERGED}", "stands for endlessly many values"),
    ("a: &a [*a]", "stands for endlessly many values"), ("a: &a {b: *a}", "stands for endlessly many values"),
    ("a: " + "[" * 50_000, "nested too deeply"), ("a: 0x" + "f" * 100_000, "is out of bounds"),
    ("a: " + "1:" * 50_000 + "1", "is out of bounds"), ("# " + "x" * 300_000, "and 262,144 are the most"),
], ids=["aliases", "merged", "within itself", "table", "nested", "number", "sixties", "long"])  # fmt: skip
def test_yaml_that_explodes(refused: Refused, tmp_path: Path, written: str, says: str) -> None:
    (tmp_path / "recipe.yaml").write_text(written)
    assert says in " ".join(refused("quantize", "--recipe", tmp_path / "recipe.yaml").split())


def test_a_pipe_is_no_recipe(refused: Refused, model: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "a named pipe" in refused("quantize", "--recipe", tmp_path / "pipe")
    flags = ("--scheme", SCHEME, "-o", tmp_path / "out")
    assert "a named pipe" in refused("quantize", model, *flags, "--allocation", tmp_path / "pipe")


def test_an_alias_stands_for_one_value(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"model: {model}\nscheme: &s W4A16g32\nscheme-for: {{'*.down_proj': *s}}\n")
    assert run("quantize", "--recipe", tmp_path / "recipe.yaml", "--dry-run", "--json").json["linears"] == 14


def test_an_allocation_is_one_file(run: Run, model: Path, tmp_path: Path) -> None:
    ran = run("quantize", model, "--scheme", SCHEME, "--allocation", "a.json", "--allocation", "b.json", "--dry-run")
    assert ran.code == 2 and "--allocation is given 2 times (a.json, b.json) and takes one file" in ran.error


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ('samples: 2\nseed: !!bool "x"', "line 2: 'x' is no bool"),
        ('seed: !!int "x"', "line 1: 'x' is no int"),
        ("seed: !!float [1]", "line 1: "),
        ("scheme: !!omap x", "line 1"),
        ("scheme: !!set [1]", "cannot be read as YAML: a tag (!!set, !!omap) stands"),
        ("scheme: !!null x\nseed: !!pairs [1]", "line 2"),
        ("? [1]\n: 2", "line 1"),
    ],
)
def test_values_that_yaml_itself_trips_over(refused: Refused, tmp_path: Path, written: str, says: str) -> None:
    (tmp_path / "recipe.yaml").write_text(written)
    assert says in " ".join(refused("quantize", "--recipe", tmp_path / "recipe.yaml").split())
