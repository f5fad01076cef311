"""Generated programs, each in a process of its own with limits; what that does not hold off: docs/evaluation.md."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from bitwright.evaluation import sandbox

SECONDS = 10.0
MEMORY_BYTES = 2**30
FILE_BYTES = 2**20
GRACE = 5.0  # seconds that the watcher may take beyond the program's own
# -I would make the order of sets differ from run to run; these two are the rest of it, and the environment is ours.
PYTHON = (sys.executable, "-s", "-P", "-B")


@dataclass(frozen=True)
class Outcome:
    """How a program ended, in the words of ``sandbox``; ``isolated`` where the kernel gave it no network, and no
    way to signal other processes.
    """

    outcome: str
    isolated: bool

    @property
    def passed(self) -> bool:
        """It ran to its last line."""
        return self.outcome == sandbox.PASSED


def run_program(program: str, seconds: float = SECONDS, isolate: bool = True) -> Outcome:
    """Runs a program in an empty folder, which is gone afterwards, for at most so many seconds.

    ``isolate``: without network, and unable to signal other processes, where the kernel allows it.
    """
    asked = {"program": program, "seconds": seconds, "isolate": isolate}
    asked |= {"memory_bytes": MEMORY_BYTES, "file_bytes": FILE_BYTES}
    with TemporaryDirectory(prefix="bitwright-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            (*PYTHON, str(Path(sandbox.__file__).resolve())),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=_environment(folder),
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(json.dumps(asked).encode(), timeout=seconds + GRACE)
        except subprocess.TimeoutExpired:
            return Outcome(sandbox.TOO_LONG, False)
        finally:  # interrupted, too
            process.kill()
            process.communicate()
    return _read(said)


def _environment(folder: str) -> dict[str, str]:
    """Nothing of ours: no tokens, no paths, one thread."""
    return {
        "PATH": os.defpath,
        "HOME": folder,
        "TMPDIR": folder,
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def _read(said: bytes) -> Outcome:
    """What the watcher wrote; a program that killed it has not passed."""
    try:
        found = json.loads(said)
        return Outcome(str(found["outcome"]), bool(found["isolated"]))
    except (ValueError, KeyError, TypeError):
        return Outcome(sandbox.FAILED, False)
