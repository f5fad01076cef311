"""Texts for the embedded demonstration model, read from the installed Python standard library.

The modules form three disjoint sets: evaluation and calibration modules are held out, all others are training data. The
texts depend only on the Python version that is installed.
"""

import sysconfig
from pathlib import Path
from typing import Final

from bitwright.core.errors import UserError

EVALUATION_MODULES: Final[frozenset[str]] = frozenset(
    {"argparse", "configparser", "csv", "heapq", "shutil", "statistics", "tarfile", "textwrap"}
)
"""Top-level modules whose source measures perplexity (about 400 KB)."""

CALIBRATION_MODULES: Final[frozenset[str]] = frozenset(
    {
        "calendar",
        "dataclasses",
        "ipaddress",
        "json",
        "logging",
        "mailbox",
        "pprint",
        "shlex",
        "string",
        "tempfile",
        "threading",
        "weakref",
    }
)
"""Top-level modules whose source is calibration data (about 600 KB)."""

# Folders that do not belong to the library proper, that a distribution may leave out, or (encodings) that hold tables
# of numbers rather than program text.
_LEFT_OUT_FOLDERS: Final[frozenset[str]] = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "encodings",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)

# Generated when Python is built: it records the paths of the building machine.
_LEFT_OUT_PREFIX: Final[str] = "_sysconfigdata"


def stdlib_folder() -> Path:
    """The folder of the installed standard library."""
    return Path(sysconfig.get_path("stdlib"))


def module_of(relative: Path) -> str:
    """The top-level module of a source file whose path is relative to the standard library."""
    return relative.parts[0].removesuffix(".py")


def training_files(folder: Path | None = None) -> list[Path]:
    """The source files of the training modules, relative to the library's folder, sorted by name."""
    held_out = EVALUATION_MODULES | CALIBRATION_MODULES
    files = [path for path in _source_files(folder or stdlib_folder()) if module_of(path) not in held_out]
    if not files:
        raise _missing(folder or stdlib_folder(), "training", [])
    return files


def training_text(folder: Path | None = None) -> str:
    """The source of every module that is not held out, files sorted by name."""
    return _joined(folder or stdlib_folder(), training_files(folder))


def calibration_text(folder: Path | None = None) -> str:
    """The source of the calibration modules, files sorted by name."""
    return _held_out_text(folder or stdlib_folder(), CALIBRATION_MODULES, "calibration")


def evaluation_text(folder: Path | None = None) -> str:
    """The source of the evaluation modules, files sorted by name."""
    return _held_out_text(folder or stdlib_folder(), EVALUATION_MODULES, "evaluation")


def read_source(folder: Path, relative: Path) -> str:
    """Read one source file; bytes that are not UTF-8 become replacement characters."""
    return (folder / relative).read_text(encoding="utf-8", errors="replace")


def _source_files(folder: Path) -> list[Path]:
    """All usable source files below a folder, as relative paths in an order that no file system changes."""
    # Left-out folders are skipped before they are entered: site-packages can hold a hundred times the library.
    entries = [entry for entry in folder.glob("*") if entry.name not in _LEFT_OUT_FOLDERS]
    files = [path for entry in entries for path in (entry.rglob("*.py") if entry.is_dir() else [entry])]
    relative = [path.relative_to(folder) for path in files if path.suffix == ".py"]
    return sorted((path for path in relative if _is_usable(path)), key=lambda path: path.as_posix())


def _is_usable(relative: Path) -> bool:
    return not relative.name.startswith(_LEFT_OUT_PREFIX) and _LEFT_OUT_FOLDERS.isdisjoint(relative.parts[:-1])


def _held_out_text(folder: Path, modules: frozenset[str], purpose: str) -> str:
    files = [path for path in _source_files(folder) if module_of(path) in modules]
    # Without one of the modules, figures could not be compared with anybody's.
    missing = sorted(modules - {module_of(path) for path in files})
    if missing:
        raise _missing(folder, purpose, missing)
    return _joined(folder, files)


def _joined(folder: Path, files: list[Path]) -> str:
    return "\n".join(read_source(folder, path) for path in files)


def _missing(folder: Path, purpose: str, modules: list[str]) -> UserError:
    wanted = f"the modules {', '.join(modules)}" if modules else "its modules"
    return UserError(
        f"the {purpose} text of the demonstration model is the source (.py files) of the Python standard library: "
        f"{wanted} were looked for in {folder} and not found (a zipped or compiled library has no sources). "
        "Install the sources of the standard library, or give a text of your own "
        "with --calibration FILE or --text FILE"
    )
