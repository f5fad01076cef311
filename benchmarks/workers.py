"""Runs a client's worker (``clients/NAME_worker.py``) in the client's own environment."""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from rows import Row

ROOT = Path(__file__).parent.parent
WORKERS = Path(__file__).parent / "clients"
LIMIT, LOG_TAIL = 1200, 3000


class NotRun(Exception):
    """Why a client gave no result: it is not there, or broke off."""


def interpreters(given: Sequence[str]) -> dict[str, str]:
    """Interpreters by client: those named (CLIENT=INTERPRETER), else those that ``make clients`` made."""
    found = {path.parts[-3]: str(path) for path in ROOT.glob(".clients/*/bin/python")}
    for one in given:
        name, _, path = one.partition("=")
        if not os.path.exists(path) or not (WORKERS / f"{name}_worker.py").exists():
            raise typer.BadParameter(f"'{one}' should read CLIENT=INTERPRETER, both of them there (benchmarks/clients)")
        found[name] = os.path.abspath(path)  # the link that it is: an environment is known by it
    return found


def run(client: str, python: str, model: Path, request: Row, scratch: Path) -> dict[str, Any]:
    """What the worker gave of a folder or file; ``request`` as ``clients/client.py`` reads it. Raises NotRun with what
    it said."""
    told, result, log = scratch / "request.json", scratch / "result.json", scratch / "log.txt"
    told.write_text(json.dumps(request))
    command = [python, str(WORKERS / f"{client}_worker.py"), str(model), str(told), str(result)]
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    quiet = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(request["threads"])}
    try:
        with log.open("w") as file:
            done = subprocess.run(
                command, cwd=scratch, env=alone | quiet, stdout=file, stderr=subprocess.STDOUT, timeout=LIMIT
            )
    except subprocess.TimeoutExpired:
        raise NotRun(f"the client was not done after {LIMIT} seconds") from None
    if done.returncode or not result.exists():
        raise NotRun(f"{log.read_text(errors='replace')[-LOG_TAIL:]}\nthe client ended with {done.returncode}")
    found: dict[str, Any] = json.loads(result.read_text())
    return found
