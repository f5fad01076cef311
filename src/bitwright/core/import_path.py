"""The folders that modules are imported from: never the current folder, nor one that holds a model.

A downloaded folder may hold a ``torch.py``. Python searches the current folder first for ``python -m``, for ``python
-c``, and for an empty or relative entry of PYTHONPATH. ``bitwright/__init__.py`` imports this file before all others,
while the current folder is still searched. So it imports nothing but ``os`` and ``sys``, which Python has loaded by
then.
"""

import os
import sys

PROGRAM = "bitwright"
PATHS = "PYTHONPATH"
KERNELS = "kernels"
"""The package by which transformers fetches code from the hub and runs it, whatever trust_remote_code says."""
MODEL_FILES = (".safetensors", ".gguf")
HOME = os.path.realpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, os.pardir))
"""The folder that this very package is imported from."""


def is_program() -> bool:
    """Whether this process is the command line, and not somebody's program that imports ``bitwright``."""
    arguments: list[str] = getattr(sys, "argv", None) or [""]
    if arguments[0] == "-m":  # while Python imports the package that -m names, which may be somebody else's
        module = (sys.orig_argv[-len(arguments) :] or [""])[0]
        module = module[module.find("m") + 1 :] if module.startswith("-") else module
        return module.partition(".")[0] == PROGRAM
    return os.path.splitext(os.path.basename(arguments[0]))[0].removesuffix("-script") == PROGRAM


def forget_current_folder() -> None:
    """Take the current folder, and folders of models, out of what this process and its children import from.

    Only what Python put there goes: the first entry, and those of PYTHONPATH.
    """
    named = {"", *map(_absolute, _entries()), *map(_absolute, sys.path[:1])}
    kept = safe_path(sys.path)
    absolute = [_absolute(entry) for entry in sys.path]
    sys.path[:] = [entry for entry in absolute if entry in kept or entry not in named]
    if os.environ.get(PATHS):
        os.environ[PATHS] = os.pathsep.join(safe_path(_entries()))
    os.environ["PYTHONSAFEPATH"] = "1"
    if "PATH" in os.environ:  # libraries ask programs such as uname about the machine
        os.environ["PATH"] = absolute_entries(os.environ["PATH"]) or os.defpath


def hide_kernels() -> None:
    """Make this process, which is ours alone, find no package of kernels; call it before transformers is imported."""
    sys.modules.setdefault(KERNELS, None)  # type: ignore[arg-type]  # None: Python looks no further


def safe_path(entries: list[str]) -> list[str]:
    """The entries of an import path that name no folder of a stranger's, as absolute paths.

    Left out are the current folder, folders that hold a model, and what PYTHONPATH names relative to the current
    folder. The folder of this package and Python's own are always kept.
    """
    unsafe = {_absolute(entry) for entry in _entries() if not os.path.isabs(entry)}
    here, own = os.path.realpath(_absolute("") or os.sep), _own_folders()
    safe = []
    for path in filter(None, map(_absolute, entries)):
        real = os.path.realpath(path)
        if real in own or not (real == here or path in unsafe or _holds_a_model(real)):
            safe.append(path)
    return safe


def absolute_entries(paths: str) -> str:
    """A list of folders, as in PATH, without those that are relative to the current folder, the empty one included."""
    return os.pathsep.join(entry for entry in paths.split(os.pathsep) if os.path.isabs(entry))


def _entries() -> list[str]:
    """The entries of PYTHONPATH; the empty one, too, is the current folder."""
    value = "" if sys.flags.ignore_environment else os.environ.get(PATHS, "")
    return value.split(os.pathsep) if value else []


def _absolute(entry: str) -> str:
    """The absolute path of an entry; empty if there is no current folder any more."""
    try:
        return os.path.abspath(entry)
    except OSError:
        return ""


def _own_folders() -> set[str]:
    """The folders of this package, of the standard library, and of the packages beside it."""
    library = os.path.dirname(os.path.abspath(os.__file__))
    libraries = [library, *(os.path.join(sys.prefix, lib, os.path.basename(library)) for lib in ("lib", "lib64"))]
    return {
        HOME,
        *(os.path.realpath(os.path.join(folder, end)) for folder in libraries for end in ("", "site-packages")),
    }


def _holds_a_model(folder: str) -> bool:
    try:
        names = os.listdir(folder)
    except OSError:  # a zip file, or nothing
        return False
    return "config.json" in names or any(name.endswith(MODEL_FILES) for name in names)
