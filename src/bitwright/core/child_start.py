"""The first lines of every child process: end with the parent, then begin with what the process was started for.

    python -P child_start.py PARENT TARGET [ARGUMENT ...]

TARGET is a script, or a module whose ``main`` is called with the arguments. PARENT is the parent's process id, 0 if it
is not known. This is a script for any interpreter, so it imports the standard library alone, and little of it.
"""

import os
import sys

PR_SET_PDEATHSIG, SIGKILL = 1, 9  # linux/prctl.h


def end_with_parent(parent: int) -> None:
    """Have the kernel end this process when its parent ends, whatever this process does then; Linux only.

    ``parent`` may have ended before the kernel was asked: then this process ends at once.
    """
    try:
        import ctypes

        if ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) != 0:
            return
    except (ImportError, OSError, AttributeError, TypeError):  # another system: a pipe's end must do
        return
    if parent and os.getppid() != parent:
        os._exit(1)


def main(parent: str, target: str, *arguments: str) -> None:
    """End with the parent from now on, and run the target."""
    end_with_parent(int(parent))
    sys.argv = [target, *arguments]
    if target.endswith(".py"):
        import runpy

        runpy.run_path(target, run_name="__main__")
    else:
        import importlib

        importlib.import_module(target).main(*arguments)


if __name__ == "__main__":
    if sys.path and os.path.abspath(sys.path[0]) == os.path.dirname(os.path.abspath(__file__)):
        del sys.path[0]  # a Python older than 3.11 knows no -P
    main(*sys.argv[1:])
