"""Written folders in the oldest, the locked and the newest transformers and compressed-tensors that are supported.

    python benchmarks/matrix.py
    python benchmarks/matrix.py --python newest=ENV/bin/python

Quantizes the embedded model with rtn in schemes of every kind, in this environment. In each of the others (``make
matrix`` makes ``.matrix/NAME``), ``matrix_worker.py`` loads the folders with plain transformers and ``bitwright.load``,
those in the bitwright format with transformers after ``import bitwright``. Logits are compared with those of our own
decoding. Writes benchmarks/results/matrix.md. Ends with 1 if a folder is loaded wrong that
``formats/_compressed_tensors_releases.py`` does not know of, or if Bitwright does not load it right.
"""

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rows import Kept, Row, listed, machine

import bitwright
from bitwright.core.recipe import Recipe
from bitwright.demo import MODEL_DIR
from bitwright.evaluation.loading import load_codes
from bitwright.formats import CONFIG, QuantizedFolder
from bitwright.verification.folder import LOGITS_APART, WITH_ACTIVATIONS

ROOT = Path(__file__).parent.parent
WORKER = Path(__file__).parent / "matrix_worker.py"
ENVIRONMENTS = ("oldest", "locked", "newest")
TOKENS = list(range(1, 65))
PLAIN, PLUGIN, LOAD = "plain", "plugin", "load"


@dataclass(frozen=True)
class Kind:
    """A kind of folder: format, scheme, and the scheme of down_proj if that is another."""

    format: str
    scheme: str
    down: str | None = None

    @property
    def name(self) -> str:
        """The scheme in words."""
        return self.scheme if self.down is None else f"{self.scheme}, down_proj {self.down}"

    @property
    def ways(self) -> tuple[str, ...]:
        """The ways in which it is loaded."""
        return (PLAIN, LOAD) if self.format == "compressed-tensors" else (PLUGIN,)


KINDS = (
    *(Kind("compressed-tensors", scheme) for scheme in ("W4A16", "W4A16sym", "W4A16g64", "W4A16g64sym", "W3A16g64")),
    Kind("compressed-tensors", "W4A16g64sym", "W8A16g64sym"),
    Kind("compressed-tensors", "W4A16g64", "W8A16g64"),
    *(Kind("compressed-tensors", scheme) for scheme in ("W8A8", "W8A8sym", "W4A8", "W4A8g64", "W4A4", "W4A16KV8")),
    *(Kind("compressed-tensors", scheme) for scheme in ("W8A8KV16", "W8A8KV16sym", "W4A16KV8sym")),
    *(Kind("bitwright", scheme) for scheme in ("W4A16g64", "W3A16g64ic", "W8A8", "W4A4", "W4A16KV8")),
    Kind("bitwright", "W4A16g64", "W8A16g64"),
)


def main(
    python: Annotated[list[str] | None, typer.Option(help="ENVIRONMENT=INTERPRETER; repeatable.")] = None,
    name: Annotated[str, typer.Option(help="Name of the result files.")] = "matrix",
) -> None:
    """Write the folders, load them everywhere, write the table."""
    pythons = {e: str(ROOT / ".matrix" / e / "bin" / "python") for e in ENVIRONMENTS}
    pythons |= dict(text.split("=", 1) for text in python or [])
    with TemporaryDirectory() as scratch:
        jobs = [job for kind in KINDS for job in _jobs(kind, Path(scratch))]
        jobs.sort(key=lambda job: job["how"] != PLAIN)
        answers = {e: _run(pythons[e], jobs, Path(scratch)) for e in ENVIRONMENTS if os.path.exists(pythons[e])}
        unexpected = _write(name, jobs, answers)
    print(*unexpected, sep="\n")
    raise typer.Exit(1 if unexpected or not answers else 0)


def _jobs(kind: Kind, scratch: Path) -> list[Row]:
    """Quantize, and note what is to be loaded."""
    folder = scratch / f"{kind.format}-{kind.scheme}-{kind.down}"
    others = None if kind.down is None else {"*.down_proj": kind.down}
    bitwright.quantize(Recipe(str(MODEL_DIR), kind.scheme, method="rtn", format=kind.format, scheme_for=others), folder)
    model = QuantizedFolder.open(folder)
    with torch.no_grad():
        torch.save(load_codes(model)(torch.tensor([TOKENS])).logits[0], folder.with_suffix(".pt"))
    return [
        {
            "folder": str(folder), "how": how, "tokens": TOKENS, "logits": str(folder.with_suffix(".pt")),
            "format": kind.format, "scheme": kind.name, "config": model.checkpoint.config[CONFIG],
            "allowed": WITH_ACTIVATIONS if model.described and model.described.activations else LOGITS_APART,
        }
        for how in kind.ways
    ]  # fmt: skip


def _run(python: str, jobs: list[Row], scratch: Path) -> dict[str, Any]:
    request, result = scratch / "request.json", scratch / "result.json"
    request.write_text(json.dumps(jobs))
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT / "src")}
    subprocess.run([python, str(WORKER), str(request), str(result)], env=os.environ | quiet, check=True)
    answer: dict[str, Any] = json.loads(result.read_text())
    return answer


def _write(name: str, jobs: list[Row], answers: dict[str, Any]) -> list[str]:
    """Write rows and table; return what nobody expected."""
    from bitwright.formats._compressed_tensors_releases import wrongly_loaded

    unexpected, cells, rows = [], [], []
    for n, job in enumerate(jobs):
        line = [job["format"], job["scheme"], HOW[job["how"]]]
        for environment, answer in answers.items():
            result, pair = answer["results"][n], answer["versions"]
            right = result.get("apart", 1e9) <= job["allowed"]
            known = wrongly_loaded(job["config"], (pair["transformers"], pair["compressed-tensors"]))
            known = known if job["how"] == PLAIN else None
            if not right and known is None:
                unexpected.append(f"{environment}: {line}: {result}, expected: {known or 'right'}")
            said = f"{result['apart']:.4f}" if "apart" in result else "error"
            line.append(said if right and known is None else f"**{said}**")
            rows.append(
                {"environment": environment, "versions": pair, "format": job["format"], "scheme": job["scheme"]}
                | {"how": job["how"], "right": right, "known": known}
                | result
            )
        cells.append(line)
    kept = Kept(name, {})
    versions = " ".join(f"{e}: {listed(answer['versions'])}." for e, answer in answers.items())
    here = machine()
    (Path(__file__).parent / "results" / f"{name}.jsonl").write_text(
        "".join(json.dumps({"date": here["date"]} | row) + "\n" for row in rows)
    )
    kept.write_table(
        "Folders in the oldest, the locked and the newest releases",
        "`make matrix`. The embedded model, rtn, loaded in float32; root mean square difference of logits from those "
        f"of Bitwright's own decoding, in their standard deviations. Right: at most {LOGITS_APART}, with quantized "
        f"activations {WITH_ACTIVATIONS}; what is not is **bold**, and so is a small difference because "
        f"keys, values and queries were left in full precision. Measured {here['date']} on {here['hardware']}; "
        f"written with {listed(here['versions'])}. {versions}",
        ("format", "scheme", "loaded by", *answers),
        cells,
    )
    return unexpected


HOW = {PLAIN: "transformers", PLUGIN: "transformers after import bitwright", LOAD: "bitwright.load"}

if __name__ == "__main__":
    typer.run(main)
