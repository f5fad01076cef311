"""Check values that two trees report differently: work them out from what the tree AFTER wrote, and from the model.

Each check takes a difference, its case, and the folder with the cases' folders of the tree AFTER.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from fnmatch import translate
from math import ceil, isclose, prod
from pathlib import Path
from typing import Any

from compare_cases import FEWER, Case
from compare_files import ABSENT, Difference
from compare_outputs import (
    account_of,
    bits_on_disk,
    bits_per_weight,
    matrices_kept,
    rows_of,
    tensor_bytes,
    tensors_of_model,
    weight_bytes,
)

ENGINE_FILES = ("gguf", "mlc")
"""Formats that are an engine's own files: an account in them is that of the folder that they were made of."""
OUTER = r"^lm_head\.|^model\.embed_tokens\."
"""Output layer and embedding."""
REASONS = {
    "output layer": r"^lm_head\.",
    "embedding": r"\.embed_tokens\.",
    "outside of the blocks": r"\.embed_positions\.",
    "router or gate of experts": r"\.mlp\.(gate|router)\.",
    "no linear's: its name does not end in .weight": r"_bias$",
    "no linear of this architecture": "",
} | {f"excluded by {pattern}": translate(f"{pattern}.weight") for pattern in FEWER["exclude"].split(",")}
"""Why matrices stay in full precision, and in which names; what goes block by block knows one reason for all."""


def stored_bits(difference: Difference, case: Case, outputs: Path) -> bool:
    """Whether bits of linears are those that the output takes on disk.

    An engine's file that was exported tells of the run before it.
    """
    told = case.source if case.source and case.how.get("format") in ENGINE_FILES else case.name
    account = account_of(told, outputs)
    if difference.key in ("totals.bits_per_weight", "result.bits_per_weight"):
        return bool(difference.after == bits_per_weight(rows_of(account)))
    row = _row(difference, account)
    bits = row["storage_bits"] if told == case.source else bits_on_disk(row["name"], case.name, outputs)
    return bool(difference.after == (bits if difference.key.endswith("storage_bits") else bits / prod(row["shape"])))


def groups_of_forty(difference: Difference, case: Case, outputs: Path) -> bool:
    """Whether bits are those of MLC's 3-bit groups: 40 weights or the rest of a row, in 4 words and a float16 scale."""
    rows, columns = _row(difference, account_of(case.name, outputs))["shape"]
    bits = rows * ceil(columns / 40) * (4 * 32 + 16)
    return bool(difference.after == (bits if difference.key.endswith("storage_bits") else bits / (rows * columns)))


def bytes_of_weights(difference: Difference, case: Case, outputs: Path) -> bool:
    """Whether the bytes that are reported are those of the weight files that were written, or read by an export."""
    read = difference.key == "result.bytes_in"
    return difference.after == weight_bytes(case.source if read else case.name, outputs)


def bits_of_model(difference: Difference, case: Case, outputs: Path) -> bool:
    """Whether new bits per weight are all weight files over all parameters of the model."""
    parameters = sum(prod(shape) for shape, _ in tensors_of_model(case, outputs).values())
    return difference.before is ABSENT and difference.after == 8 * weight_bytes(case.name, outputs) / parameters


def full_bits(difference: Difference, case: Case, outputs: Path) -> bool:
    """Whether new bits are those of the dtype that most weights of the model have."""
    bits = Counter[float]()
    for shape, size in tensors_of_model(case, outputs).values():
        bits[8 * size / prod(shape)] += prod(shape)
    return difference.before is ABSENT and difference.after == bits.most_common(1)[0][0]


def matrices_left_alone(difference: Difference, case: Case, outputs: Path) -> bool:
    """Whether new shares, by the reason, are those of the matrices that stay in full precision."""
    format, matrices = account_of(case.name, outputs)["format"], matrices_kept(case, outputs)
    if format == "dense":
        matrices = {}
    elif format in ENGINE_FILES and case.how.get("embeddings") != "f16":
        matrices = _inner(matrices)
    return difference.before is ABSENT and _are_shares(difference.after, matrices)


def real_schemes(difference: Difference, case: Case, outputs: Path) -> bool:
    """Whether all linears of an export have the tiles of their schemes, and the grids that its config.json says.

    If that says none, the grids are those of the folder that was read; KV4 beside A4 says nothing more.
    """
    account = account_of(case.name, outputs)
    schemes = [row.get("scheme", account["scheme"]) for row in rows_of(account)]
    config = account.get("quantization_config") or {}
    if "group_size" in config:
        symmetric = config.get("sym", not config.get("zero_point"))
        right = set(schemes) == {f"W{config['bits']}A16g{config['group_size']}{'sym' if symmetric else ''}"}
    else:
        right = {*map(_grid, schemes)} == {_grid(account_of(case.source, outputs)["scheme"])}
    tiles = (_tile(scheme, row["shape"]) for scheme, row in zip(schemes, rows_of(account), strict=True))
    return right and all(row["tile"] == tile for row, tile in zip(rows_of(account), tiles, strict=True))


def outliers_lost(difference: Difference, case: Case, outputs: Path) -> bool:
    """Whether an export says no outliers, and stores none."""
    return difference.after == 0 and not any("outlier" in name for name in tensor_bytes(case.name, outputs))


def along_the_output(difference: Difference, case: Case, outputs: Path) -> bool:
    """Whether linears are counted that have groups along their output."""
    tiles = [row["tile"] for row in rows_of(account_of(case.name, outputs))]
    return bool(difference.after == sum(columns == 1 < rows for rows, columns in tiles))


def schemes_of_linears(difference: Difference, case: Case, outputs: Path) -> bool:
    """Whether a new ``allocation.json`` has the schemes of the account, for every linear that it names."""
    if difference.before is not ABSENT:
        return False
    allocation = json.loads((outputs / case.name / difference.file).read_text(encoding="utf-8"))
    account = account_of(case.name, outputs)
    quantized = {name: scheme for name, scheme in allocation["linears"].items() if scheme is not None}
    schemes = {row["name"]: row.get("scheme", account["scheme"]) for row in rows_of(account)}
    return bool(allocation["scheme"] == account["scheme"] and quantized == schemes)


def _row(difference: Difference, account: Any) -> Any:
    """Return the linear of an account that a key is about."""
    _, block, _, linear, _ = difference.key.split(".")
    return account["blocks"][int(block)]["linears"][int(linear)]


def _inner(matrices: Mapping[str, float]) -> dict[str, float]:
    return {name: share for name, share in matrices.items() if not re.search(OUTER, name)}


def _are_shares(shares: object, matrices: Mapping[str, float]) -> bool:
    """Whether shares by the reason are those of matrices by name."""
    if not isinstance(shares, dict) or not shares.keys() <= REASONS.keys():
        return False
    right = {why: sum(share for name, share in matrices.items() if re.search(REASONS[why], name)) for why in shares}
    return isclose(sum(shares.values()), sum(matrices.values())) and all(
        isclose(shares[why], right[why]) for why in right
    )


def _grid(scheme: str) -> str:
    """Leave out of a scheme which weights share a scale, and bits of the KV cache that are those of activations."""
    return re.sub(r"g\d+(ic)?", "", re.sub(r"A(\d+)KV\1", r"A\1", scheme))


def _tile(scheme: str, shape: list[int]) -> list[int]:
    """Return the rows and columns that share a scale under a scheme."""
    rows, columns = shape
    group = re.search(r"g(\d+)(ic)?", scheme)
    if group is None:
        return [1, columns]
    return [min(int(group[1]), rows), 1] if group[2] else [1, min(int(group[1]), columns)]
