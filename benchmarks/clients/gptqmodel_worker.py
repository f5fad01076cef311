"""GPTQModel on a CPU: folders in gptq and awq.

    python3.11 -m venv ENV
    ENV/bin/pip install torch==2.13.0
    ENV/bin/pip install gptqmodel==7.6.0

Tried with gptqmodel 7.6.0, torch 2.13.0, transformers 5.24.0. ``options`` may name a ``backend`` of its ``BACKEND``
("gptq_torch", "gptq_torch_fused", ...); without one it chooses by bits and group.
"""

import os
from time import monotonic

from client import Request, measure_module


def main() -> None:
    """Load the folder and measure it."""
    request = Request.given()
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its pool needs two at least
    import torch
    from gptqmodel import BACKEND, GPTQModel

    start = monotonic()
    asked = {} if request.dtype == "auto" else {"dtype": getattr(torch, request.dtype)}
    backend = BACKEND(request.options.get("backend", "auto"))
    model = GPTQModel.load(request.folder, device="cpu", backend=backend, **asked).model
    seconds = monotonic() - start
    kernels = sorted({type(module).__name__ for module in model.modules() if hasattr(module, "qweight")})
    measured = measure_module(model, request)
    request.write(measured, "gptqmodel", "torch", "transformers", seconds_to_load=seconds, kernels=kernels)


if __name__ == "__main__":
    main()
