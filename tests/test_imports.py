"""The tree tells the story of the data: who may import whom, and what two rooms keep silent about.

The rules are read from the source with ``ast``, nothing is imported: an import inside a function, under
``TYPE_CHECKING`` or relative to its package counts as much as one at the top of a file, and so does a string that
is the dotted name of a room's module (``import_module("bitwright.methods.rtn")``).
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "src" / "bitwright"

MAY_IMPORT: dict[str, set[str]] = {
    "core": set(),
    "checkpoint": {"core"},
    "families": {"core"},
    "demo": {"core"},
    "calibration": {"core", "demo"},
    "steps": {"core"},
    "kernels": {"core"},
    "methods": {"core", "steps"},
    "engines": {"core"},
    "formats": {"core", "checkpoint", "kernels", "steps"},
    "model": {"core", "checkpoint", "formats", "calibration", "steps"},
    "stream": {"core", "checkpoint", "calibration", "steps", "model"},
    "prepare": {"core", "checkpoint", "calibration", "methods", "engines", "formats", "model", "stream"},
    "evaluation": {"core", "checkpoint", "calibration", "steps", "kernels", "engines", "formats", "model", "stream"},
    "verification": {"core", "checkpoint", "formats", "model", "evaluation", "stream"},
    "written": {
        "core",
        "checkpoint",
        "calibration",
        "methods",
        "formats",
        "model",
        "stream",
        "prepare",
        "verification",
    },
    "convert": {"core", "checkpoint", "steps", "formats", "model", "stream", "prepare", "verification", "written"},
    "report": {"core", "kernels"},
    "plugin": {"core", "checkpoint", "steps", "kernels", "formats"},
    "cli": {"api", "core", "report"},
    "__init__": {"api", "core", "plugin"},
    "__main__": {"cli"},
}
"""What each room may import beside itself. A room that is not here has no rule yet, and is refused until it has."""
MAY_IMPORT["api"] = set(MAY_IMPORT) - {"cli", "__init__", "__main__"}

CORE_MAY_USE = frozenset(sys.stdlib_module_names) | {"bitwright", "jaxtyping", "torch"}
"""Top-level packages that core may import. The other rooms are free in what they take from outside."""

EXPLAINS_NOTHING = {"utils", "helpers", "common"}

FILES = sorted(PACKAGE.rglob("*.py"))


def modules_of(room: str) -> set[str]:
    """Names of a room's public modules: a method's or an architecture's name is its file's name."""
    return {path.stem for path in (PACKAGE / room).glob("*.py") if not path.stem.startswith("_")}


METHODS = modules_of("methods")
ARCHITECTURES = modules_of("families")
METHODS_OF_TESTS, ARCHITECTURES_OF_TESTS = {"gptq", "let", "lwc"}, {"llama"}
"""What the examples of violations take for all there are."""


def room_of(path: str) -> str:
    """The room of a file, by its path relative to the package."""
    return PurePosixPath(path).parts[0].removesuffix(".py")


def rooms() -> set[str]:
    """The rooms there are: folders and files directly in the package."""
    return {room_of(path.relative_to(PACKAGE).as_posix()) for path in FILES}


def violations(path: str, source: str, methods: set[str], architectures: set[str]) -> list[str]:
    """The rules that a file breaks, one line each; ``path`` is relative to the package."""
    room = room_of(path)
    if room not in MAY_IMPORT:
        return [f"{path}: {room} has no rule; add it to MAY_IMPORT and to docs/architecture.md"]
    tree = ast.parse(source)
    silent_about = {"stream": methods, "methods": architectures}.get(room, set())
    return [*_imports_refused(path, room, tree), *_names_refused(path, room, tree, silent_about)]


def _imports_refused(path: str, room: str, tree: ast.Module) -> Iterator[str]:
    for line, module in _imported(path, tree):
        top, _, inside = module.partition(".")
        if top == "bitwright":
            other = inside.partition(".")[0] or "__init__"
            if other != room and other not in MAY_IMPORT[room]:
                allowed = ", ".join(sorted(MAY_IMPORT[room])) or "no other room"
                yield f"{path}:{line}: {room} imports {module}; it may import {allowed}"
        elif room == "core" and top not in CORE_MAY_USE:
            yield f"{path}:{line}: core imports {module}; it may import torch, jaxtyping and the standard library"


def _imported(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of everything the file imports or names by its dotted name."""
    package = ("bitwright", *PurePosixPath(path).parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            if module == "bitwright":  # then the names are rooms, or else things of the package's own __init__
                names = (alias.name for alias in node.names)
                yield from ((node.lineno, f"bitwright.{name}" if name in MAY_IMPORT else "bitwright") for name in names)
            else:
                yield node.lineno, module
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            dotted = re.fullmatch(r"(bitwright\.\w+(\.\w+)*)\.?", node.value)  # an f-string may go on after a dot
            if dotted and dotted[1].split(".")[1] in MAY_IMPORT:
                yield node.lineno, dotted[1]


def _names_refused(path: str, room: str, tree: ast.Module, silent_about: set[str]) -> Iterator[str]:
    for line, text in _names_and_strings(tree):
        words = _words(text)
        for name in sorted(silent_about):
            if f"_{name}_" in words:
                yield f"{path}:{line}: {room} names {name!r} (in {text!r}), and must not know it"


def _words(text: str) -> str:
    """The words of an identifier or a short string, between underscores: ``RtnMethod`` is ``_rtn_method_``."""
    separated = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[^0-9a-zA-Z]+", "_", text)
    return f"_{separated.strip('_').lower()}_"


def _names_and_strings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, text) of every identifier and of every string without a space, so that prose stays free."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        for field in ("id", "attr", "arg", "name", "asname", "module"):
            if isinstance(text := getattr(node, field, None), str):
                yield line, text
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and not re.search(r"\s", node.value):
            yield line, node.value


def test_there_is_something_to_check() -> None:
    assert len(FILES) > 10
    assert METHODS
    assert ARCHITECTURES


@pytest.mark.parametrize("path", FILES, ids=[path.relative_to(PACKAGE).as_posix() for path in FILES])
def test_file_keeps_the_rules(path: Path) -> None:
    relative = path.relative_to(PACKAGE).as_posix()
    broken = violations(relative, path.read_text(encoding="utf-8"), METHODS, ARCHITECTURES)
    assert not broken, "\n".join(broken)


def test_every_package_folder_has_an_init() -> None:
    folders = {folder for path in FILES for folder in path.parents if folder.is_relative_to(PACKAGE)}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_file_names_say_why_the_file_exists() -> None:
    places = [REPOSITORY / place for place in ("src", "tests", "tools", "benchmarks")]
    files = [path for place in places for path in place.rglob("*.py")]
    assert [str(path) for path in files if path.stem in EXPLAINS_NOTHING] == []


@pytest.mark.parametrize(
    ("path", "source", "module"),
    [
        ("core/scheme.py", "import numpy", "numpy"),
        ("core/scheme.py", "from safetensors.torch import load_file", "safetensors.torch"),
        ("core/scheme.py", "from bitwright.steps.ranges import minmax", "bitwright.steps.ranges"),
        ("core/scheme.py", "import bitwright", "bitwright"),
        ("checkpoint/reader.py", "from bitwright.families import llama", "bitwright.families"),
        ("families/llama.py", "import bitwright.checkpoint.reader as r", "bitwright.checkpoint.reader"),
        ("kernels/reference.py", "from ..formats import gguf", "bitwright.formats"),
        ("methods/rtn.py", "from bitwright import stream", "bitwright.stream"),
        ("methods/rtn.py", "from .. import calibration", "bitwright.calibration"),
        ("methods/rtn.py", "from bitwright import quantize", "bitwright"),
        ("methods/deep/rtn.py", "from ...families.opt import topology", "bitwright.families.opt"),
        ("methods/__init__.py", "from ..families.opt import topology", "bitwright.families.opt"),
        ("stream/blocks.py", "def run():\n    from bitwright.methods import rtn", "bitwright.methods"),
        ("stream/blocks.py", "if TYPE_CHECKING:\n    import bitwright.formats.awq", "bitwright.formats.awq"),
        ("stream/blocks.py", "import_module('bitwright.formats.gguf')", "bitwright.formats.gguf"),
        ("stream/blocks.py", "import_module(f'bitwright.formats.{name}')", "bitwright.formats"),
        ("formats/gguf/model.py", "from bitwright.stream import runner", "bitwright.stream"),
        ("evaluation/measure.py", "from bitwright.methods import rtn", "bitwright.methods"),
        ("report/screens.py", "from bitwright.evaluation import measure", "bitwright.evaluation"),
        ("demo/texts.py", "from bitwright.calibration import tokens", "bitwright.calibration"),
        ("model/source.py", "from bitwright.prepare import job", "bitwright.prepare"),
        ("verification/folder.py", "from bitwright.written import sink", "bitwright.written"),
        ("cli/commands.py", "from bitwright.methods import rtn", "bitwright.methods"),
        ("cli/commands.py", "from ..stream import runner", "bitwright.stream"),
        ("api/quantizing.py", "from bitwright import cli", "bitwright.cli"),
        ("__init__.py", "from .formats import compressed", "bitwright.formats"),
        ("__main__.py", "from bitwright.api import quantize", "bitwright.api"),
    ],
)
def test_an_import_is_refused(path: str, source: str, module: str) -> None:
    (broken,) = violations(path, source, METHODS_OF_TESTS, ARCHITECTURES_OF_TESTS)
    line, room = len(source.splitlines()), room_of(path)
    assert broken.startswith(f"{path}:{line}: {room} imports {module}; it may import ") and room in rooms()


@pytest.mark.parametrize(
    ("path", "source", "name"),
    [
        ("stream/blocks.py", "if name == 'gptq': pass", "gptq"),
        ("stream/blocks.py", "if recipe == 'let+awq': pass", "let"),
        ("stream/blocks.py", "gptq_damping = 0.01", "gptq"),
        ("stream/blocks.py", "class GptqRunner: pass", "gptq"),
        ("stream/blocks.py", "def run(*, lwc): pass", "lwc"),
        ("stream/blocks.py", "recipe.lwc", "lwc"),
        ("methods/awq.py", "if model_type == 'llama': pass", "llama"),
        ("methods/awq.py", "from transformers.models.llama import modeling", "llama"),
        ("methods/awq.py", "from transformers import modeling_llama", "llama"),
        ("methods/awq.py", "isinstance(module, LlamaDecoderLayer)", "llama"),
    ],
)
def test_a_name_is_refused(path: str, source: str, name: str) -> None:
    (broken,) = violations(path, source, METHODS_OF_TESTS, ARCHITECTURES_OF_TESTS)
    assert broken.startswith(f"{path}:1: {room_of(path)} names {name!r} (in ")
    assert broken.endswith("and must not know it") and room_of(path) in rooms()


def test_a_room_without_a_rule_is_refused() -> None:
    assert "newroom" not in rooms()
    assert violations("newroom/thing.py", "import torch", set(), set()) == [
        "newroom/thing.py: newroom has no rule; add it to MAY_IMPORT and to docs/architecture.md"
    ]


def test_the_rules_are_those_of_the_page() -> None:
    page = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| [^|]* \| ([^|]*) \|$", page, re.MULTILINE)
    stated = {room: set(re.findall(r"`(\w+)`", cell)) for room, cell in rows if room in MAY_IMPORT}
    assert stated.pop("core") == {"torch", "jaxtyping"} and dict(rows)["api"] == "every room but `cli`"
    assert stated.pop("api") == {"cli"}
    in_words = {"core", "api", "__init__", "__main__"}
    assert stated == {room: may for room, may in MAY_IMPORT.items() if room not in in_words}


def test_every_rule_is_of_a_room() -> None:
    """Both the rooms that may import and those that may be imported."""
    assert set(MAY_IMPORT) == rooms() and set().union(*MAY_IMPORT.values()) <= rooms()


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("core/qtensor.py", "import dataclasses\nimport torch\nfrom jaxtyping import Float\nfrom .scheme import Grid"),
        ("methods/gptq.py", "from bitwright.core.method import Closed\nfrom ..steps import rounding\nimport numpy"),
        ("methods/gptq.py", "'''LLaMA-2-7B at W3 in the paper; llama is what everybody measures.'''"),
        ("stream/blocks.py", "'''Let each block pass.'''\noutlet = 1\nraise ValueError('let the block be')"),
        ("stream/blocks.py", "from bitwright import calibration\nlogging.getLogger('bitwright.stream')"),
        ("formats/gguf/model.py", "from bitwright.kernels import reference"),
        (
            "api/quantizing.py",
            "from bitwright.methods import gptq\nfrom ..stream import runner\nif name == 'gptq': pass",
        ),
        ("cli/commands.py", "from bitwright import api\nfrom .report import tables"),
        ("__init__.py", "from .api import quantize"),
        ("__main__.py", "from bitwright.cli import main"),
    ],
)
def test_what_is_allowed_passes(path: str, source: str) -> None:
    assert violations(path, source, METHODS_OF_TESTS, ARCHITECTURES_OF_TESTS) == []
    assert room_of(path) in rooms()
