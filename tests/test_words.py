"""Plain words in src/: how a docstring begins and ends, and names that say what a thing is.

The sources are read with ``ast``; nothing is imported.
"""

import ast
import re
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "bitwright"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

REFUSED_BEGINNINGS = ("Of ", "That ", "The same", "Where ", "What is ")
VERBS = (
    "accept|add|answer|appl|ask|begin|build|call|check|close|come|comput|copi|decod|do|encod|fill|find|fit|get|giv|go"
    "|ha|hand|hold|keep|learn|let|listen|load|look|mak|measur|mov|need|note|pack|pass|pick|print|put|quantiz|rais|read"
    "|refus|remov|return|run|say|send|set|show|stand|start|stop|take|tell|train|tri|turn|unpack|use|wait|work|writ|yield"
)
THIRD_PERSON = re.compile(rf"({VERBS})(s|es|ies)\b(?! (of|for|in|from|to) )", re.IGNORECASE)  # not nouns: "Answers of"
"""How a docstring begins that says what something does; an imperative says it shorter."""
NAMES = frozenset({"each", "found", "made", "one", "said", "those", "told"})
"""Names that tell how a thing came about, or nothing: a name says what the thing is."""
PUBLIC = {"verification/findings.py": {"found"}}
"""Names that break the rule and stay, because users have them: ``Check.found``."""


def faults(source: str, exempt: Collection[str] = ()) -> list[str]:
    """What breaks the rules in a file, one line each; names in ``exempt`` may."""
    tree = ast.parse(source)
    return [f"line {line}: {fault}" for line, fault in sorted({*_docstring_faults(tree), *_name_faults(tree, exempt)})]


def _docstring_faults(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for line, text in _docstrings(tree):
        summary = text.strip().partition("\n")[0]
        if summary.startswith(REFUSED_BEGINNINGS) or THIRD_PERSON.match(summary):
            yield line, f"begin with an imperative or a noun phrase: {summary!r}"
        if not summary.endswith("."):
            yield line, f"end the first line with a period: {summary!r}"


def _docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, text) of the docstrings of modules, classes and functions, and of those below an assignment."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for before, statement in zip([None, *node.body], node.body, strict=False):
            documents = before is None or isinstance(before, ast.Assign | ast.AnnAssign)
            match statement:
                case ast.Expr(value=ast.Constant(value=str(text))) if documents:
                    yield statement.lineno, text


def _name_faults(tree: ast.Module, exempt: Collection[str]) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()) | ast.arg(arg=name):
                pass
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                pass
            case ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                pass
            case _:
                continue
        if name.strip("_").lower() in NAMES and name not in exempt:
            yield getattr(node, "lineno", 0), f"name it after what it is: {name!r}"


@pytest.mark.parametrize("path", FILES)
def test_plain_words(path: str) -> None:
    broken = faults((PACKAGE / path).read_text(encoding="utf-8"), PUBLIC.get(path, ()))
    assert not broken, "\n".join(f"{path}, {fault}" for fault in broken)


@pytest.mark.parametrize("path", PUBLIC)
def test_only_names_that_are_there_are_exempt(path: str) -> None:
    source = (PACKAGE / path).read_text(encoding="utf-8")
    for name in PUBLIC[path]:
        assert faults(source, PUBLIC[path] - {name})


@pytest.mark.parametrize(
    "source",
    [
        '"""Of each tile: the sum."""',
        '"""Where it begins."""',
        '"""The same of a worker."""',
        '"""What is asked."""',
        '"""Raises CheckpointError."""',
        '"""Reads a header."""',
        '"""Read a header"""',
        '"""Read a header of\na file."""',
        'def read():\n    """Reads a header."""',
        'class Header:\n    """Where it begins."""',
        'LIMIT = 3\n"""Of bytes."""',
        'class Header:\n    size: int\n    """Bytes"""',
        "found = 1",
        "self.told = 1",
        "def made(): pass",
        "def run(said): pass",
        "class Told: pass",
        "names = [one for one in range(3)]",
        "for name, found in names: pass",
        "if (found := search()): pass",
    ],
)
def test_what_breaks_the_rules_is_refused(source: str) -> None:
    assert faults(source)


@pytest.mark.parametrize(
    "source",
    [
        '"""Read the header of a safetensors file."""',
        '"""The header of a safetensors file.\n\nOf each tensor, dtype and shape.\n"""',
        '"""Whether a tensor is finite."""',
        'run()\n"""Where no docstring stands"""',
        "match = pattern.search(found)",
    ],
)
def test_plain_words_pass(source: str) -> None:
    assert faults(source) == []
