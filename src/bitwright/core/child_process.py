"""The one place that starts processes. None of them imports from the current folder or from a model's folder.

A child gets ``-P`` and the import path of this process, without those two (``import_path``). ``-I`` would do the same
for the current folder, but it also drops the user's own packages (``pip install --user``) and settings such as
PYTHONHASHSEED. ``child_start`` makes a child end with its parent.
"""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bitwright.core import child_start
from bitwright.core.errors import MachineError
from bitwright.core.import_path import PATHS, absolute_entries, safe_path

USED_UP = {errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE}
"""What the system answers if it has no room for one more process, or for its pipes."""
SEARCHED = ("PATH", "LD_LIBRARY_PATH")


def python_command(target: str, python: str | None = None) -> tuple[str, ...]:
    """The command that runs a script, or ``main`` of a module of ours, in a new Python.

    ``python`` is an interpreter of another environment, which may be older and know no ``-P``.
    """
    start = str(Path(child_start.__file__).resolve())
    if python is not None:  # it may be a script that starts the interpreter, so its parent is not known
        return python, start, "0", target
    return sys.executable, "-P", start, str(os.getpid()), target


def bare_command(script: str) -> tuple[str, ...]:
    """The command that runs a script with the standard library alone; its environment is the caller's to choose.

    The flags are the parts of ``-I`` except the one that makes the order of sets differ from run to run.
    """
    return sys.executable, "-s", "-P", "-B", str(Path(child_start.__file__).resolve()), str(os.getpid()), script


def child_environment(other: bool = False) -> dict[str, str]:
    """The environment of a child; ``other`` is for an interpreter that does not share this one's packages."""
    environment = dict(os.environ)
    paths = environment.get(PATHS, "")
    path = safe_path(paths.split(os.pathsep) if paths else []) if other else safe_path(sys.path)
    for name in SEARCHED:
        if name in environment:
            environment[name] = absolute_entries(environment[name])
    environment |= {PATHS: os.pathsep.join(path), "PYTHONSAFEPATH": "1"}
    return {name: value for name, value in environment.items() if value or name not in (PATHS, *SEARCHED)}


def start(command: tuple[str, ...], **options: Any) -> "subprocess.Popen[bytes]":
    """Start a process. Raises MachineError if the system starts no more, and OSError if there is no such program."""
    try:
        return subprocess.Popen(command, **options)
    except OSError as error:
        if error.errno in USED_UP:
            raise MachineError.of(error) from error
        raise


def run(command: tuple[str, ...], other: bool = False) -> "subprocess.CompletedProcess[bytes]":
    """Run a command to its end, and return what it printed; errors are those of ``start``."""
    pipe = subprocess.PIPE
    environment = child_environment(other)
    with start(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, env=environment) as process:
        try:
            output, errors = process.communicate()
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)
