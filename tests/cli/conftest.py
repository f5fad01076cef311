"""What the tests of the command line share: the command line called in this process, and models that may be broken."""

import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import transformers  # noqa: F401  # now, because what it logs goes to the standard error of this moment

from bitwright import cli
from bitwright.checkpoint.reader import Checkpoint

TEXT = "The quick brown fox jumps over the lazy dog. "
TOKENS = 100 * len(TEXT)
"""Tokens of the fixture ``text``: one byte is one token."""
SCHEME = "W4A16g32"


@dataclass(frozen=True)
class Ran:
    """What a command did: its exit code, and what it printed where."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as JSON; fails where anything else stands on it, or a word that JSON does not know."""
        return json.loads(self.out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))

    @property
    def error(self) -> str:
        """The one error message, which ends standard error."""
        before, _, message = self.err.partition("error: ")
        assert message and "error: " not in message, self.err
        assert "Traceback" not in before
        return message


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """``run("inspect", folder)``: the command line, as ``bitwright inspect FOLDER`` calls it."""
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setenv("TQDM_DISABLE", "1")

    def call(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["bitwright", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Ran(ended.value.code, printed.out, printed.err)

    yield call
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def refused(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """``refused("quantize", ...)``: the message of a command that ends with exit code 2, having changed no file and
    read no tensor."""

    def call(*arguments: object) -> str:
        before = tree(tmp_path)
        with monkeypatch.context() as patched:
            patched.setattr(Checkpoint, "read", lambda *_: pytest.fail("a tensor was read before the refusal"))
            ran = run(*arguments)
        assert ran.code == 2, ran.err
        assert ran.out == ""
        assert tree(tmp_path) == before
        return ran.error

    return call


@pytest.fixture
def model(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may break."""
    return Path(shutil.copytree(tiny(), tmp_path / "model"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text file of TOKENS tokens."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 100)
    return path


def tree(folder: Path) -> dict[str, tuple[int, int] | None]:
    """Everything in a folder: files with size and time of the last change, everything else with None."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found[str(path)] = (status.st_size, status.st_mtime_ns) if path.is_file() else None
    return found


def change_config(folder: Path, **changes: Any) -> None:
    """Sets keys of a config.json; ``...`` removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def change_tensors(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrites model.safetensors after a change to its tensors."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
