"""Plain transformers: folders in compressed-tensors, and dense ones.

    python3.11 -m venv ENV
    ENV/bin/pip install torch==2.13.0
    ENV/bin/pip install transformers==5.22.2 compressed-tensors==0.20.0

Tried with these versions and with transformers 5.24.0. For gptq and awq: ``optimum_worker.py``.
"""

from importlib.metadata import PackageNotFoundError, version
from time import monotonic

from client import Request, measure_module

LIBRARIES = ("transformers", "torch", "compressed-tensors", "gptqmodel", "optimum")


def main() -> None:
    """Load the folder and measure it."""
    request = Request.given()
    from transformers import AutoModelForCausalLM

    start = monotonic()
    model = AutoModelForCausalLM.from_pretrained(request.folder, dtype=request.dtype, local_files_only=True).eval()
    seconds = monotonic() - start
    measured = measure_module(model, request)
    request.write(measured, *filter(_is_there, LIBRARIES), seconds_to_load=seconds)


def _is_there(library: str) -> bool:
    try:
        return bool(version(library))
    except PackageNotFoundError:
        return False


if __name__ == "__main__":
    main()
