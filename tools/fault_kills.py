"""Runs that are killed at random moments and repeated: the output must have the bytes of an undisturbed run."""

import hashlib
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from compare_cases import FORMATS, METHODS, Case, cases

TIMINGS = "bitwright-timings.json"
MOST_SECONDS = 300.0
MOST_OF_A_CASE = 3
"""How often one case is killed."""


@dataclass
class Kills:
    """What came of the killed runs."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)


def kill_runs(work: Path, kills: int, seed: int) -> Kills:
    """Kill so many runs, over the methods and formats in turn, and repeat each until it is done."""
    import_module("bitwright.api.quantizing")  # before the processes are forked, so that they need not
    result, drawn = Kills(), random.Random(seed)
    known = {case.name: case for case in cases(())}
    formats = list(FORMATS)
    names = [
        f"small/{method}/{formats[(at + turn) % len(formats)]}"
        for turn in range(len(formats))
        for at, method in enumerate(METHODS)
    ]  # every method and every format within the first turn
    at = 0
    while result.counts["killed"] < kills:
        most = min(MOST_OF_A_CASE, kills - result.counts["killed"])
        _kill_case(work, known[names[at % len(names)]], most, drawn, result)
        at += 1
    return result


def _kill_case(work: Path, case: Case, most: int, drawn: random.Random, result: Kills) -> None:
    """Run a case undisturbed; then kill it, up to ``most`` times, at moments of its own duration, and repeat it."""
    folder = work / "kills"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    end = "out.gguf" if case.how.get("format") == "gguf" else "out"
    whole, output = folder / f"whole-{end}", folder / f"killed-{end}"
    began = time.monotonic()
    _run(work, case, whole, MOST_SECONDS)
    lasted, killed = time.monotonic() - began, 0
    while whole.exists() and killed < most and not output.exists():
        _run(work, case, output, drawn.uniform(0.0, lasted))
        killed += 1
    if not output.exists():
        _run(work, case, output, MOST_SECONDS)
    word = "unfinished"
    if whole.exists() and output.exists():
        word = "same" if _digests(whole) == _digests(output) else "different"
    result.counts["cases"] += 1
    result.counts["killed"] += max(killed, 1)
    result.counts[word] += max(killed, 1)
    if word != "same":
        result.failures.append({"kind": "killed runs", "changes": [], "reason": f"{case.name}: {word}"})


def _run(work: Path, case: Case, output: Path, most_seconds: float) -> None:
    """Run a case in a forked process, which is killed after so many seconds."""
    child = os.fork()
    if child == 0:
        _perform(work, case, output)
    end = time.monotonic() + most_seconds
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            return
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def _perform(work: Path, case: Case, output: Path) -> None:
    """Make the call of a case, and end the process; what it prints goes to a file."""
    import bitwright

    log = os.open(work / "kills.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        workers = 1 if case.how["method"] in ("rtn", "easyquant") else None  # one process, which can be killed
        bitwright.quantize(bitwright.Recipe(work / case.model, **case.how), output, workers=workers)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(0)


def _digests(output: Path) -> dict[str, str]:
    """The digest of every file of an output; the one that holds the clock is left out."""
    files = [output] if output.is_file() else sorted(path for path in output.rglob("*") if path.is_file())
    return {
        "" if path == output else str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name != TIMINGS
    }
