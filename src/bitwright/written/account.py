"""What is said of a run: bitwright.json, and what tells one run from another before it is continued."""

import platform
from collections.abc import Iterable
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from bitwright.calibration.tokens import fingerprint
from bitwright.core.format import FileFormat
from bitwright.model.arithmetic import name_of
from bitwright.prepare.job import Job

EXPECTED_SHARE = 0.01
"""Of weights beyond three standard deviations, in trained models."""
WRITTEN = "written"
"""Of what tells runs apart: when the model's files were written to."""
LOST = 0.5
"""Of a weight, ``|W_q - W|^2 / |W|^2``."""
LIBRARIES = ("torch", "transformers", "compressed-tensors", "safetensors")


def identity(job: Job) -> dict[str, Any]:
    """What decides the bytes of the result; a run is continued only where all of it is the same."""
    recipe = job.recipe.as_dict()
    # The model and the text are identified by what they hold, not by where they lie.
    for place in ("model", "calibration", "load_parameters"):
        del recipe[place]
    return {
        "recipe": recipe,
        "model": job.source.checkpoint.fingerprint(),
        WRITTEN: job.source.checkpoint.modified(),
        "calibration": _calibration(job),
        "arithmetic": _arithmetic(job),
        "parameters": None if job.learned is None else job.learned.digest(),
        "versions": _versions(),
    }


def run_account(job: Job, reports: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """bitwright.json: the same recipe, seed and machine give the same bytes of it too."""
    rows = [row for report in reports for row in report["linears"]]
    weights = sum(row["shape"][0] * row["shape"][1] for row in rows)
    written_as = job.named_format(reports)
    return {
        "bitwright": version("bitwright"),
        "recipe": job.recipe.as_dict(),
        "scheme": str(job.scheme),
        "method": job.method,
        "format": written_as,
        "settings": _settings(job),
        "seed": job.recipe.seed,
        "versions": _versions(),
        "model": job.source.checkpoint.fingerprint(),
        "calibration": _calibration(job),
        "totals": {
            "linears": len(rows),
            "per_ic": _along_the_output(job, rows),
            "outliers": sum(row["outliers"] for row in rows),
            "quantized_weights": weights,
            "bits_per_weight": _bits(job, rows) / weights,
            "bytes_in": job.source.checkpoint.total_bytes,
            "bytes_out": sum(path.stat().st_size for path in folder.glob("model*.safetensors")),
        },
        "notes": [
            note
            for note in (job.note, job.left_out(job.settled_format(reports)), _many_outliers(rows), _lost(job, rows))
            if note is not None
        ],
        "fallbacks": list(_unique(text for report in reports for text in report["fallbacks"])),
        "blocks": reports,
    }


def _along_the_output(job: Job, rows: list[dict[str, Any]]) -> int:
    """How many linears have groups along their output; the tile of one that is stored [in, out] lies the other way."""
    turned = {weight.name for weight in job.work.weights if weight.transposed}
    tiles = (row["tile"][::-1] if row["name"] in turned else row["tile"] for row in rows)
    return sum(columns == 1 < rows_ for rows_, columns in tiles)


def _bits(job: Job, rows: list[dict[str, Any]]) -> int:
    """What all quantized linears take where they end up."""
    if not isinstance(job.target, FileFormat):
        return sum(row["storage_bits"] for row in rows)
    return sum(8 * job.target.stored_bytes((*row["shape"],), job.scheme, job.scales) for row in rows)


def _arithmetic(job: Job) -> str:
    trained = "" if job.arithmetic is None else f", training in {name_of(job.arithmetic)}"
    return f"{job.work.device.type} {name_of(job.work.dtype)}{trained}"


def _settings(job: Job) -> dict[str, Any]:
    """What the methods were told, ``auto`` replaced by what it came to."""
    found = job.configuration.values()
    return found if job.arithmetic is None else found | {"precision": name_of(job.arithmetic)}


def _lost(job: Job, rows: list[dict[str, Any]]) -> str | None:
    """A note on linears of which little is left, or of which that cannot be told."""
    lost = [row for row in rows if not row["weight_error"] <= LOST]
    if not lost:
        return None
    worst = min(lost, key=lambda row: (isfinite(row["weight_error"]), -row["weight_error"]))
    most = f"{worst['weight_error']:.2g}" if isfinite(worst["weight_error"]) else "its weights are too large to square"
    remedy = "More bits, smaller groups, or methods that see a text lose less"
    if job.scales == torch.float16 != job.source.checkpoint.dtype_of_weights:
        remedy += (
            "; small weights, a --format that stores scales in the checkpoint's dtype (bitwright, compressed-tensors)"
        )
    return (
        f"of {len(lost)} linears more than half is lost, by squared error; the most of {worst['name']}: {most}. "
        f"{remedy}"
    )


def _many_outliers(rows: list[dict[str, Any]]) -> str | None:
    most = max(rows, key=lambda row: row["outlier_share"])
    if most["outlier_share"] <= EXPECTED_SHARE:
        return None
    return (
        f"more outliers than the {EXPECTED_SHARE:.0%} that are usual: {most['outlier_share']:.1%} of {most['name']}. "
        "They take 48 bits each; --outliers 4, or a share such as --outliers 0.5%, keeps fewer"
    )


def _calibration(job: Job) -> dict[str, Any] | None:
    if job.tokens is None:
        return None
    samples, seqlen = job.tokens.shape
    return {"segments": samples, "seqlen": seqlen, "tokens_sha256": fingerprint(job.tokens)}


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def _unique(texts: Iterable[str]) -> Iterable[str]:
    return dict.fromkeys(texts)
