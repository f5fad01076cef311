"""Read the outputs of cases, for the checks of ``compare_allowed.py``: accounts, and sizes as they are on disk.

``outputs`` is the folder with the cases' folders of a tree; the models lie beside it.
"""

import json
from collections.abc import Iterable
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from compare_cases import Case
from compare_child import FILE, FOLDER
from compare_files import ACCOUNT, IN_GGUF, by_name, is_gguf

IN_BLOCK = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
"""The linears of a block by their names in GGUF."""
UNCOUNTED = (".bias", ".weight_shape")
"""Tensors of a linear that its bits leave out."""
WEIGHTS = (".safetensors", ".bin")
"""The endings of files that hold weights, in a folder of any format."""


def account_of(case: str, outputs: Path) -> Any:
    """Read the account of a case, beside the weights or in the GGUF file."""
    accounts = [path for path in _output(case, outputs) if path.name == ACCOUNT or is_gguf(path)]
    path = min(accounts, key=lambda path: path.name != ACCOUNT)
    return _account(path, path.stat().st_mtime_ns)


def rows_of(account: Any) -> list[Any]:
    """List the reports of all linears in an account."""
    return [row for block in account["blocks"] for row in block["linears"]]


def bits_per_weight(rows: Iterable[Any]) -> float:
    """Return the bits per weight of linears together, by their reports."""
    bits, weights = zip(*((row["storage_bits"], prod(row["shape"])) for row in rows), strict=True)
    return float(sum(bits) / sum(weights))


def weight_bytes(case: str, outputs: Path) -> int:
    """Return the size of the weight files that a case wrote."""
    return sum(path.stat().st_size for path in _output(case, outputs) if path.suffix in WEIGHTS or is_gguf(path))


def tensor_bytes(case: str, outputs: Path) -> dict[str, int]:
    """Return the bytes of each tensor that a case wrote by its name in the model; biases are left out."""
    files = [path for path in _output(case, outputs) if path.suffix == ".safetensors" or is_gguf(path)]
    return {name: size for path in files for name, size in _sizes(path, path.stat().st_mtime_ns).items()}


def bits_on_disk(linear: str, case: str, outputs: Path) -> int:
    """Sum the bits of a linear's tensors, without its bias."""
    sizes = tensor_bytes(case, outputs)
    return 8 * sum(size for name, size in sizes.items() if name == linear or name.startswith(f"{linear}."))


def tensors_of_model(case: Case, outputs: Path) -> dict[str, tuple[list[int], int]]:
    """Return the shape and the bytes of each tensor of a case's model."""
    files = (outputs.parent / "models" / case.model).glob("*.safetensors")
    return {name: tensor for path in files for name, tensor in _header(path, path.stat().st_mtime_ns).items()}


def matrices_kept(case: Case, outputs: Path) -> dict[str, float]:
    """Return the matrices of a model that no linear of the account is, with their share of all weights of matrices."""
    linears = {row["name"]: prod(row["shape"]) for row in rows_of(account_of(case.name, outputs))}
    others = {
        name: prod(shape)
        for name, (shape, _) in tensors_of_model(case, outputs).items()
        if len(shape) in (2, 3) and min(shape[1:]) > 1 and name.removesuffix(".weight") not in linears
    }
    total = sum(linears.values()) + sum(others.values())
    return {name: weights / total for name, weights in others.items()}


def _output(case: str, outputs: Path) -> list[Path]:
    """List the file or the files that a case wrote."""
    (output,) = (path for name in (FILE, FOLDER) if (path := outputs / case / name).exists())
    return [output] if output.is_file() else [path for path in output.rglob("*") if path.is_file()]


@lru_cache(maxsize=64)
def _account(path: Path, modified: int) -> Any:
    """Read the account from a file that was written to at this time."""
    from gguf import GGUFReader

    account = GGUFReader(path).fields[IN_GGUF].parts[-1].tobytes() if is_gguf(path) else path.read_bytes()
    return by_name(json.loads(account))


@lru_cache(maxsize=64)
def _sizes(path: Path, modified: int) -> dict[str, int]:
    """Return the bytes of each tensor by its name in the model, biases left out, of a file as it was at this time."""
    from gguf import GGUFReader

    if is_gguf(path):
        return {_in_model(tensor.name): int(tensor.n_bytes) for tensor in GGUFReader(path).tensors}
    return {name: size for name, (_, size) in _header(path, modified).items() if not name.endswith(UNCOUNTED)}


@lru_cache(maxsize=64)
def _header(path: Path, modified: int) -> dict[str, tuple[list[int], int]]:
    """Return the shape and the bytes of each tensor in a safetensors file as it was at this time."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return {name: (row["shape"], row["data_offsets"][1] - row["data_offsets"][0]) for name, row in header.items()}


def _in_model(name: str) -> str:
    """Turn a name in GGUF into that of the linear in the model; other names stay."""
    if name == "output.weight":
        return "lm_head"
    kind, _, rest = name.removesuffix(".weight").partition(".")
    block, _, linear = rest.partition(".")
    return f"model.layers.{block}.{IN_BLOCK[linear]}" if kind == "blk" and linear in IN_BLOCK else name
