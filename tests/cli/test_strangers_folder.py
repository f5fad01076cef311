"""No command runs a file of the folder that it is called in, whatever that file is called."""

import json
import os
import pkgutil
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tests.cli.conftest import TEXT

from bitwright.core.errors import UserError
from bitwright.evaluation.contenders import llama_cpp_command

SOURCE = str(Path(__file__).resolve().parents[2] / "src")
SCRIPT = Path(sys.executable).with_name("bitwright")
TRAP = "import _io\n_io.open({marker!r}, 'a').write({name!r})\nraise SystemExit(9)\n"
BEFORE_US = {"importlib", "runpy", "warnings", "contextlib", "collections", "keyword", "operator", "reprlib"}
BEFORE_US |= {"functools", "types", "bitwright"}
"""What ``python -m bitwright`` imports from the current folder before any line of ours; SECURITY.md says so."""
FEW = {"torch", "transformers", "pickle", "yaml", "numpy", "typing", "json", "subprocess", "safetensors", "kernels"}
DEMO = (
    "import sys; sys.argv = ['bitwright', 'demo']; import bitwright.api.demonstrating as d; d.SCHEMES = d.SCHEMES[:1]; "
    "d.SEQLEN, d.WINDOWS, d.NEW_TOKENS = 32, 1, 1; from bitwright.cli import main; main()"
)


class Stranger:
    """Model folders in which every name that Python may import is a trap, which notes that it was run."""

    def __init__(self, model: Path, place: Path) -> None:
        self.model, self.place, self.marker = model, place, place / "marker"
        modules = {module.name for module in pkgutil.iter_modules() if module.name.isidentifier()}
        self.names = {*modules, *sys.stdlib_module_names, "sitecustomize", "usercustomize", "xllamacpp", "kernels"}
        self.text = place / "text.txt"
        self.text.write_text(TEXT * 100)

    def folder(self, name: str, traps: set[str]) -> Path:
        """A model folder with these traps; its config and tokenizer also name code in it, and a kernel on the hub."""
        folder = Path(shutil.copytree(self.model, self.place / name))
        for trap in traps:
            (folder / f"{trap}.py").write_text(self.trap(trap))
        if "bitwright" in traps:
            (folder / "bitwright").mkdir()
            (folder / "bitwright" / "__init__.py").write_text(self.trap("bitwright/"))
        (folder / "evil.pth").write_text(f"import _io; _io.open({str(self.marker)!r}, 'a').write('pth')\n")
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_text(self.trap("custom_generate"))
        for auto in ("configuration", "modeling", "tokenization"):
            (folder / f"{auto}_evil.py").write_text(self.trap(auto))
        self._name_code(folder)
        return folder

    def trap(self, name: str) -> str:
        return TRAP.format(marker=str(self.marker), name=f"{name} ")

    def _name_code(self, folder: Path) -> None:
        classes = {"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
        changes = {
            "config.json": {"auto_map": classes, "_attn_implementation": "kernels-community/evil"},
            "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["tokenization_evil.T", None]}},
        }
        for file, change in changes.items():
            content = json.loads((folder / file).read_text())
            (folder / file).write_text(json.dumps(content | change))

    def ran(self, command: Sequence[object], folder: Path, paths: str = SOURCE) -> str:
        """Run a command in a folder; it must end well, and no trap may have run. Returns standard error."""
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        ended = subprocess.run(
            list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert (self.marker.read_text() if self.marker.exists() else "") == ""
        assert ended.returncode == 0, ended.stderr
        return ended.stderr


@pytest.fixture(scope="module")
def stranger(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Stranger:
    return Stranger(tiny(), tmp_path_factory.mktemp("stranger"))


@pytest.fixture(scope="module")
def trapped(stranger: Stranger) -> Path:
    """A folder in which everything is a trap."""
    return stranger.folder("trapped", {*stranger.names, "bitwright"})


@pytest.fixture(scope="module")
def trapped_for_m(stranger: Stranger) -> Path:
    """A folder in which everything is a trap that does not run before Bitwright does."""
    return stranger.folder("trapped-for-m", stranger.names - BEFORE_US)


@pytest.fixture(scope="module")
def quantized(stranger: Stranger, trapped: Path) -> Path:
    """A folder that worker processes wrote, started by the console script in a stranger's folder."""
    output = stranger.place / "out"
    quantize = ["quantize", ".", "--scheme", "W4A16g32", "--workers", "2", "--format", "compressed-tensors"]
    stranger.ran([SCRIPT, *quantize, "-o", output], trapped)
    return output


def test_workers(quantized: Path) -> None:
    assert (quantized / "config.json").is_file()


@pytest.mark.parametrize(
    "arguments",
    [
        ["engines"],
        ["evaluate", ".", "--text", "TEXT", "--seqlen", "32", "--windows", "1"],
        ["export", "OUT", "--format", "gptq", "-o", "../exported"],
        ["quantize", ".", "--scheme", "W4A16g32", "--workers", "2", "-o", "../planned", "--dry-run"],
    ],
    ids=lambda arguments: str(arguments[0]),
)
def test_console_script(arguments: list[str], stranger: Stranger, trapped: Path, quantized: Path) -> None:
    named = {"TEXT": stranger.text, "OUT": quantized}
    stranger.ran([SCRIPT, *(named.get(word, word) for word in arguments)], trapped)


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "."],
        ["verify", "OUT", "--against", "."],
        ["bench", ".", "--tokens", "2", "--prompt", "2", "--rounds", "1"],
        [
            "quantize",
            ".",
            *("--scheme", "W4A16g32", "--method", "awq", "-o", "../awq"),
            *("--calibration", "TEXT", "--samples", "2", "--seqlen", "16"),
        ],
    ],
    ids=lambda arguments: str(arguments[0]),
)
def test_python_m(arguments: list[str], stranger: Stranger, trapped_for_m: Path, quantized: Path) -> None:
    named = {"TEXT": stranger.text, "OUT": quantized}
    command = [sys.executable, "-m", "bitwright", *(named.get(word, word) for word in arguments)]
    stranger.ran(command, trapped_for_m)


def test_demo(stranger: Stranger, trapped_for_m: Path) -> None:
    stranger.ran([sys.executable, "-c", DEMO], trapped_for_m)


def test_path_of_the_user(stranger: Stranger) -> None:
    """PYTHONPATH with an empty entry, a dot, and the folder itself."""
    folder = stranger.folder("few", FEW)
    quantize = ["quantize", ".", "--scheme", "W4A16g32", "--workers", "2", "-o", "../from-few"]
    stranger.ran([SCRIPT, *quantize], folder, os.pathsep.join([".", "", str(folder), SOURCE]))


def test_probes_of_llama_cpp(stranger: Stranger, trapped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trapped)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setenv("PYTHONPATH", "")
    for given in ({"python": sys.executable, "library": None}, {"python": None, "library": "nothing.so"}):
        with pytest.raises(UserError, match=r"cannot import xllamacpp|is no llama\.cpp"):
            llama_cpp_command(**given)
    assert not stranger.marker.exists()
