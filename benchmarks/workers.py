"""Run a client's worker (``clients/NAME_worker.py``) in the client's own environment."""

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
    """The reason why a client gave no result: it is not there, or broke off."""


def interpreters(given: Sequence[str]) -> dict[str, str]:
    """The interpreters by client: those named (CLIENT=INTERPRETER), else those of ``make clients``."""
    pythons = {path.parts[-3]: str(path) for path in ROOT.glob(".clients/*/bin/python")}
    for text in given:
        name, _, path = text.partition("=")
        if not os.path.exists(path) or not (WORKERS / f"{name}_worker.py").exists():
            raise typer.BadParameter(
                f"'{text}' should read CLIENT=INTERPRETER, both of them there (benchmarks/clients)"
            )
        pythons[name] = os.path.abspath(path)  # the link that it is: an environment is known by it
    return pythons


def run(client: str, python: str, model: Path, request: Row, scratch: Path) -> dict[str, Any]:
    """Run a client's worker on a folder or file; ``request`` is as ``clients/client.py`` reads it.

    Raises NotRun with the worker's output.
    """
    request_file, result, log = scratch / "request.json", scratch / "result.json", scratch / "log.txt"
    request_file.write_text(json.dumps(request))
    command = [python, str(WORKERS / f"{client}_worker.py"), str(model), str(request_file), str(result)]
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
    answer: dict[str, Any] = json.loads(result.read_text())
    return answer
