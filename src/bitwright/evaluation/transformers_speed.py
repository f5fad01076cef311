"""Measure speed and memory of a folder in transformers, in a process that ``bench`` starts for each measurement.

    python -m bitwright.evaluation.transformers_speed REQUEST.json RESULT.json

REQUEST: {"model": FOLDER, "prompt": n, "tokens": n, "threads": n, "device": "cpu", "dtype": "bfloat16"}; RESULT:
weight_bytes, peak_bytes, tokens_per_second, prompt_tokens_per_second, version.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bitwright.core.errors import UserError
from bitwright.core.import_path import hide_kernels
from bitwright.evaluation.speed import time_model


def main(request: str, result: str) -> None:
    """Load the folder that the request names, time it, and write the result."""
    hide_kernels()
    from bitwright.evaluation.loading import load  # it imports transformers

    task: dict[str, Any] = json.loads(Path(request).read_text())
    torch.set_num_threads(task["threads"])
    try:
        model = load(task["model"], device=task["device"], dtype=task["dtype"])
    except UserError as error:
        raise SystemExit(str(error)) from None
    speed = time_model(model, task["prompt"], task["tokens"])
    runner = f"transformers {version('transformers')}, torch {version('torch')}"
    Path(result).write_text(json.dumps(speed | {"version": runner}))


if __name__ == "__main__":
    main(*sys.argv[1:])
