"""Load folders with this environment's transformers: FOLDERS.json RESULT.json, run by ``benchmarks/matrix.py``.

The request is a list of jobs: ``folder``, ``how`` (plain, plugin or load), ``tokens`` and the ``logits`` to compare
with, a file of torch. "plain" does not import Bitwright, so plain jobs come first. The result says what
happened to each job.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


def logits_of(job: dict[str, Any]) -> Any:
    """The logits of a folder in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    if job["how"] == "load":
        import bitwright

        model: Any = bitwright.load(job["folder"], device="cpu", dtype="float32")
    else:
        if job["how"] == "plugin":
            import bitwright
        kind: Any = AutoModelForCausalLM
        model = kind.from_pretrained(job["folder"], dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([job["tokens"]])).logits[0]


def result_of(job: dict[str, Any]) -> dict[str, Any]:
    """How far the logits are from those expected, in their standard deviations, or the error."""
    import torch

    try:
        logits, expected = logits_of(job), torch.load(job["logits"])
    except Exception as error:  # whatever a library raises is the result
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]}
    return {"apart": float((logits - expected).square().mean().sqrt() / expected.std())}


def main(request: Path, result: Path) -> None:
    """Do all jobs and write the result."""
    jobs = json.loads(request.read_text())
    assert "bitwright" not in sys.modules, "plain means without Bitwright"
    done = [result_of(job) for job in sorted(jobs, key=lambda job: job["how"] != "plain")]
    versions = {name: version(name) for name in ("torch", "transformers", "compressed-tensors")}
    result.write_text(json.dumps({"versions": versions, "results": done}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
