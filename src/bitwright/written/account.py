"""Write the account of a run (bitwright.json), and the identity that tells whether a killed run may be continued."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from bitwright.calibration.tokens import fingerprint
from bitwright.core.account import Account, BlockReport, CalibrationData, LinearReport, Totals
from bitwright.core.format import TensorFormat
from bitwright.prepare.prepared import Prepared

EXPECTED_SHARE = 0.01
"""The share of weights beyond three standard deviations in trained models."""
PATTERNS = ("scheme_for", "include", "exclude")
WRITTEN, DATA = "written", "data"
"""Keys of an identity: the times at which the model's files were written, and what ``check_weights`` says of them."""
LOST = 0.5
"""The relative squared error, ``|W_q - W|^2 / |W|^2``, above which a linear gets a note."""
LIBRARIES = ("torch", "transformers", "compressed-tensors", "safetensors")


def identity(run: Prepared, data: str, beside: Mapping[str, str]) -> dict[str, Any]:
    """Everything that decides the bytes of the result; a run is continued only if all of it is equal.

    ``data`` is what ``check_weights`` says of the weights, ``beside`` the digests of the sidecar files.
    """
    recipe = run.recipe.as_dict()
    # The model, the calibration data and files are identified by their contents, not by their paths. Patterns
    # are identified by the schemes that linears get, which are named below.
    for key in ("model", "calibration", "text_field", "load_parameters", "allocation", *PATTERNS):
        del recipe[key]
    return {
        "recipe": recipe,
        "scheme": str(run.scheme),
        "schemes": {name: str(scheme) for name, scheme in run.allocation.own.items()},
        "kept": _kept(run),
        "model": run.source.checkpoint.fingerprint(),
        WRITTEN: run.source.checkpoint.modified(),
        DATA: data,
        "beside_the_weights": dict(beside),
        "calibration": _tokens(run),
        "arithmetic": _arithmetic(run),
        "parameters": None if run.learned is None else run.learned.digest(),
        "versions": _versions(),
    }


def _kept(run: Prepared) -> list[str]:
    """The names of all linears and matrices that stay as they are; those that are quantized are all others."""
    inventory, entry = run.inventory, run.source.checkpoint.entry
    return sorted({*inventory.kept_linears, *(name for name in inventory.kept if len(entry(name).shape) > 1)})


def account_of(
    run: Prepared,
    blocks: Sequence[BlockReport],
    folder: Path,
    format: TensorFormat,
    config: Mapping[str, Any] | None,
    verified: str,
) -> Account:
    """The account of a finished folder; ``config`` is its quantization_config, ``verified`` what was read back."""
    rows = [row for block in blocks for row in block.linears]
    known = (run.source.note, run.note, run.left_out(format), run.allocated_in_part)
    notes = (*known, _many_outliers(rows), _lost(run, rows))
    return Account(
        bitwright=version("bitwright"),
        recipe=run.recipe.as_dict(),
        scheme=str(run.scheme),
        method=run.method,
        format=run.recipe.format or format.name,
        settings=_settings(run),
        seed=run.recipe.seed,
        versions=_versions(),
        model=run.source.checkpoint.fingerprint(),
        calibration=_calibration(run),
        totals=_totals(run, rows, folder),
        notes=tuple(note for note in notes if note is not None),
        fallbacks=tuple(dict.fromkeys(text for block in blocks for text in block.fallbacks)),
        blocks=tuple(blocks),
        quantization_config=config,
        verified=verified,
    )


def _totals(run: Prepared, rows: Sequence[LinearReport], folder: Path) -> Totals:
    """The sums over all linears, and the sizes of the weight files, in bytes."""
    weights = sum(row.weights for row in rows)
    return Totals(
        linears=len(rows),
        per_ic=_along_the_output(run, rows),
        outliers=sum(row.outliers for row in rows),
        quantized_weights=weights,
        bits_per_weight=sum(row.storage_bits for row in rows) / weights,
        bytes_in=run.source.checkpoint.total_bytes,
        bytes_out=sum(path.stat().st_size for path in folder.glob("model*.safetensors")),
    )


def _along_the_output(run: Prepared, rows: Sequence[LinearReport]) -> int:
    """The number of linears with groups along the output.

    A linear that is stored [in, out] has its tile turned too, so it is turned back here.
    """
    transposed = {weight.name for weight in run.inventory.weights if weight.transposed}
    tiles = (row.tile[::-1] if row.name in transposed else row.tile for row in rows)
    return sum(columns == 1 < rows_ for rows_, columns in tiles)


def _arithmetic(run: Prepared) -> str:
    trained = "" if run.arithmetic is None else f", training in {_name(run.arithmetic)}"
    return f"{run.way.device.type} {_name(run.way.dtype)}{trained}"


def _settings(run: Prepared) -> dict[str, Any]:
    """The settings of the methods, with ``auto`` replaced by the choice that was made."""
    settings = run.configuration.values()
    return settings if run.arithmetic is None else settings | {"precision": _name(run.arithmetic)}


def _lost(run: Prepared, rows: Sequence[LinearReport]) -> str | None:
    """A note on linears with a large error, or with an error that is no number; None if there are none."""
    lost = [row for row in rows if not row.weight_error <= LOST]
    if not lost:
        return None
    worst = min(lost, key=lambda row: (isfinite(row.weight_error), -row.weight_error))
    most = f"{worst.weight_error:.2g}" if isfinite(worst.weight_error) else "its weights are too large to square"
    remedy = "More bits, smaller groups, or methods that see calibration data lose less"
    if run.scales == torch.float16 != run.source.checkpoint.dtype_of_weights:
        remedy += (
            "; small weights, a --format that stores scales in the checkpoint's dtype (bitwright, compressed-tensors)"
        )
    return (
        f"of {len(lost)} linears more than half is lost, by squared error; the most of {worst.name}: {most}. {remedy}"
    )


def _many_outliers(rows: Sequence[LinearReport]) -> str | None:
    most = max(rows, key=lambda row: row.outlier_share)
    if most.outlier_share <= EXPECTED_SHARE:
        return None
    return (
        f"more outliers than the {EXPECTED_SHARE:.0%} that are usual: {most.outlier_share:.1%} of {most.name}. "
        "They take 48 bits each; --outliers 4, or a share such as --outliers 0.5%, keeps fewer"
    )


def _calibration(run: Prepared) -> CalibrationData | None:
    if run.segments is None:
        return None
    samples, seqlen = run.segments.tokens.shape
    return CalibrationData(samples, seqlen, fingerprint(run.segments.tokens), run.segments.begins_with)


def _tokens(run: Prepared) -> dict[str, Any] | None:
    """What tells calibration data from others: their tokens, among which is what each segment begins with."""
    calibration = _calibration(run)
    return None if calibration is None else {k: v for k, v in asdict(calibration).items() if k != "begins_with"}


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
