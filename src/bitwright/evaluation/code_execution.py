"""Run generated programs, each in its own process with limits; docs/evaluation.md says what these cannot prevent."""

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from bitwright.core import child_process
from bitwright.core.errors import MachineError
from bitwright.evaluation import sandbox

SECONDS = 10.0
MEMORY_BYTES = 2**30
FILE_BYTES = 2**20
GRACE = 5.0  # seconds that the watcher may take longer than the program


@dataclass(frozen=True)
class Outcome:
    """The end of a program, in the words of ``sandbox``.

    ``isolated`` is True if the kernel gave it no network, and no way to signal other processes.
    """

    outcome: str
    isolated: bool

    @property
    def passed(self) -> bool:
        """Whether the program ran to its last line."""
        return self.outcome == sandbox.PASSED


def run_program(program: str, seconds: float = SECONDS, isolate: bool = True) -> Outcome:
    """Run a program in an empty temporary folder, for at most ``seconds``.

    ``isolate`` runs it without network, and unable to signal other processes, if the kernel allows that. Raises
    MachineError if the system starts no more processes, which says nothing about the program.
    """
    request = {"program": program, "seconds": seconds, "isolate": isolate}
    request |= {"memory_bytes": MEMORY_BYTES, "file_bytes": FILE_BYTES}
    with TemporaryDirectory(prefix="bitwright-", ignore_cleanup_errors=True) as folder:
        process = child_process.start(
            child_process.bare_command(str(Path(sandbox.__file__).resolve())),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=_environment(folder),
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(json.dumps(request).encode(), timeout=seconds + GRACE)
        except subprocess.TimeoutExpired:
            return Outcome(sandbox.TOO_LONG, False)
        finally:  # interrupted, too
            process.kill()
            process.communicate()
    outcome = _read(output)
    if outcome.outcome == sandbox.NOT_STARTED:
        raise MachineError.of(OSError("a generated program could not be started"))
    return outcome


def _environment(folder: str) -> dict[str, str]:
    """The environment of a program: no secrets, no paths of ours, one thread."""
    return {
        "PATH": os.defpath,
        "HOME": folder,
        "TMPDIR": folder,
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def _read(output: bytes) -> Outcome:
    """Read the outcome that the watcher wrote; a program that killed the watcher has not passed."""
    try:
        outcome = json.loads(output)
        return Outcome(str(outcome["outcome"]), bool(outcome["isolated"]))
    except (ValueError, KeyError, TypeError):
        return Outcome(sandbox.FAILED, False)
