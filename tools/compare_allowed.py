"""The differences between two trees that are meant, each with its reason and a check of its values.

To allow one more, add a line: the exact key, and a check that lets nothing else pass.
"""

import json
import re
from functools import lru_cache
from math import ceil, isclose
from pathlib import Path
from typing import Any

from compare_cases import OUTCOME, Case
from compare_child import FILE, FOLDER
from compare_files import ABSENT, ACCOUNT, IN_GGUF, Allowed, Difference, by_name, is_gguf

WORDS = (
    ("methods that see a text lose less", "methods that see calibration data lose less"),
    ("needs no calibration text; it is used to", "needs no calibration data; they are used to"),
    ("learns from text and none was named", "learns from calibration data and none were named"),
    ("[sym|asym], for example", "[sym|asym|real], for example"),
    ("in groups along the input, the same for all linears. Leave", "in groups along the input. Leave"),
    ("symmetric or not, and 8 bits", "symmetric or not (2 to 4 with a real-valued zero), and 8 bits"),
    ("Known: llama, opt.", "Known: llama, mistral, opt, qwen2, qwen3."),
    ("asymmetric weight in tiles of", "asymmetric weight [128, 256] in tiles of"),
)
"""Parts of notes and refusals, as they were worded and as they are."""
ADDED = r"The nearest scheme that it holds is \S+\. "
"""What refusals say besides."""
IN_BLOCK = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
"""The linears of a block by their names in GGUF."""
UNCOUNTED = (".bias", ".weight_shape")
"""Tensors of a linear that its bits leave out."""


def none_is_new(difference: Difference, case: Case, outputs: Path) -> bool:
    """Whether a key is new, and nothing was asked for it."""
    return difference.before is ABSENT and difference.after is None


def rounded(difference: Difference, case: Case, outputs: Path) -> bool:
    """Whether two numbers differ only as sums in another order do."""
    before, after = difference.before, difference.after
    return isinstance(before, float) and isinstance(after, float) and isclose(before, after, rel_tol=1e-12)


def reworded(difference: Difference, case: Case, outputs: Path) -> bool:
    """Whether a text has the new words in place of the old ones, and is the same otherwise."""
    text, after = difference.before, difference.after
    if not isinstance(text, str) or not isinstance(after, str):
        return False
    for old, new in WORDS:
        text = text.replace(old, new)
    return re.sub(ADDED, "", after) == text


def stored_bits(difference: Difference, case: Case, outputs: Path) -> bool:
    """Whether bits of linears are those that the output takes on disk.

    The account of an export tells of the run before it, whose output they were compared with.
    """
    account = account_of(case.source or case.name, outputs)
    if difference.key in ("totals.bits_per_weight", "result.bits_per_weight"):
        rows = [row for block in account["blocks"] for row in block["linears"]]
        weights = sum(_weights(row) for row in rows)
        return bool(difference.after == sum(row["storage_bits"] for row in rows) / weights)
    _, block, _, linear, key = difference.key.split(".")
    row = account["blocks"][int(block)]["linears"][int(linear)]
    bits = row["storage_bits"] if case.source else _bits_on_disk(row["name"], case.name, outputs)
    return bool(difference.after == (bits if key == "storage_bits" else bits / _weights(row)))


def groups_of_forty(difference: Difference, case: Case, outputs: Path) -> bool:
    """Whether bits are those of MLC's 3-bit groups: 40 weights or the rest of a row, in 4 words and a float16 scale."""
    _, block, _, linear, key = difference.key.split(".")
    rows, columns = account_of(case.name, outputs)["blocks"][int(block)]["linears"][int(linear)]["shape"]
    bits = rows * ceil(columns / 40) * (4 * 32 + 16)
    return bool(difference.after == (bits if key == "storage_bits" else bits / (rows * columns)))


def size_on_disk(difference: Difference, case: Case, outputs: Path) -> bool:
    """Whether the bytes that are reported are those of the file or the folder that was written."""
    return difference.after == sum(path.stat().st_size for path in _output(case.name, outputs))


def one_more_or_less(difference: Difference, case: Case, outputs: Path) -> bool:
    """Whether runs that were killed had finished as many units, but for those that were on their way to the disk."""
    before, after = difference.before, difference.after
    on_the_way = case.workers or 1
    return isinstance(before, int) and isinstance(after, int) and abs(before - after) <= on_the_way


def in_another_order(difference: Difference, case: Case, outputs: Path) -> bool:
    """Whether an order differs and nothing else: that the values are the same, other keys tell."""
    return isinstance(difference.before, str) and isinstance(difference.after, str)


def group_is_row(difference: Difference, case: Case, outputs: Path) -> bool:
    """Whether groups that are whole rows are said to be groups of 128, as those of the other linears are."""
    values = difference.before, difference.after
    return values in ((-1, 128), ({"tile": [1, 128], "outliers": 0}, ABSENT))


def schemes_of_linears(difference: Difference, case: Case, outputs: Path) -> bool:
    """Whether a new ``allocation.json`` has the recipe's scheme for every linear that the account names."""
    if difference.before is not ABSENT:
        return False
    allocation = json.loads((outputs / case.name / difference.file).read_text(encoding="utf-8"))
    account = account_of(case.name, outputs)
    quantized = {name: scheme for name, scheme in allocation["linears"].items() if scheme is not None}
    linears = [row["name"] for block in account["blocks"] for row in block["linears"]]
    return bool(allocation["scheme"] == account["scheme"] and quantized == dict.fromkeys(linears, account["scheme"]))


def account_of(case: str, outputs: Path) -> Any:
    """Read the account of a case, beside the weights or in the GGUF file."""
    accounts = [path for path in _output(case, outputs) if path.name == ACCOUNT or is_gguf(path)]
    path = min(accounts, key=lambda path: path.name != ACCOUNT)
    return _account(path, path.stat().st_mtime_ns)


def _output(case: str, outputs: Path) -> list[Path]:
    """List the file or the files that a case wrote."""
    (output,) = (path for name in (FILE, FOLDER) if (path := outputs / case / name).exists())
    return [output] if output.is_file() else [path for path in output.rglob("*") if path.is_file()]


def _weights(row: Any) -> int:
    return int(row["shape"][0] * row["shape"][1])


def _bits_on_disk(linear: str, case: str, outputs: Path) -> int:
    """Sum the bits of a linear's tensors, without its bias."""
    files = [path for path in _output(case, outputs) if path.suffix == ".safetensors" or is_gguf(path)]
    sizes = [(name, size) for path in files for name, size in _sizes(path, path.stat().st_mtime_ns).items()]
    return 8 * sum(size for name, size in sizes if name == linear or name.startswith(f"{linear}."))


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
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    places = {name: tensor["data_offsets"] for name, tensor in header.items() if name != "__metadata__"}
    return {name: end - begin for name, (begin, end) in places.items() if not name.endswith(UNCOUNTED)}


def _in_model(name: str) -> str:
    """Turn a name in GGUF into that of the linear in the model; other names stay."""
    if name == "output.weight":
        return "lm_head"
    kind, _, rest = name.removesuffix(".weight").partition(".")
    block, _, linear = rest.partition(".")
    return f"model.layers.{block}.{IN_BLOCK[linear]}" if kind == "blk" and linear in IN_BLOCK else name


def one_scheme_for_all(difference: Difference, case: Case, outputs: Path) -> bool:
    """Whether ``dequantize`` is gone from a folder whose linears have several schemes."""
    config = account_of(case.name, outputs)["quantization_config"]
    weights = [group["weights"] for group in config["config_groups"].values() if group["weights"]]
    several = any(args != weights[0] for args in weights)
    return several and difference.before is True and difference.after is ABSENT


BITS = "bits are those that the format stores"
SCHEMES = "the schemes of linears are said"
ORDER = "linears of described architectures are listed in the order of the block"
ROWS = "a group that is a whole row is said to be one of the groups that the other linears have"
WORDING = "notes and refusals are worded anew"
ALLOWED = (
    Allowed(SCHEMES, "<file>", schemes_of_linears, file="allocation.json"),
    Allowed(SCHEMES, "recipe.allocation", none_is_new),
    Allowed(SCHEMES, "recipe.scheme_for", none_is_new),
    Allowed(BITS, "blocks.*.linears.*.storage_bits", stored_bits),
    Allowed(BITS, "blocks.*.linears.*.bits_per_weight", stored_bits),
    Allowed(BITS, "blocks.*.linears.*.storage_bits", groups_of_forty, case="settings/mlc_three_bits"),
    Allowed(BITS, "blocks.*.linears.*.bits_per_weight", groups_of_forty, case="settings/mlc_three_bits"),
    Allowed(BITS, "totals.bits_per_weight", stored_bits),
    Allowed(BITS, "result.bits_per_weight", stored_bits, file=OUTCOME),
    Allowed("the size counts the account, which is longer", "result.bytes_out", size_on_disk, file=OUTCOME),
    Allowed(WORDING, "notes.*", reworded),
    Allowed(WORDING, "result.notes.*", reworded, file=OUTCOME),
    Allowed(WORDING, "refused", reworded, file=OUTCOME),
    Allowed("units on their way when a run is killed", "result.resumed", one_more_or_less, OUTCOME, "killed/*"),
    Allowed(ORDER, "<order>.*", in_another_order, case="*qwen2/*"),
    Allowed(ORDER, "<bytes>", in_another_order, "config.json", "qwen2/easyquant/default"),
    Allowed(ROWS, "quantization_config.weights.tile.1", group_is_row, "*.json", "export/small/rtn/default/bitwright"),
    Allowed(ROWS, "quantization_config.exceptions.*", group_is_row, "*.json", "export/small/rtn/default/bitwright"),
    Allowed(
        "with dequantize, transformers 5.23 and later reads all linears by one scheme: other weights, or an error",
        "quantization_config.dequantize",
        one_scheme_for_all,
        "*.json",
    ),
    Allowed("sums in another order", "blocks.*.linears.*.weight_error", rounded),
)
"""Differences that may be. ``outcome.json`` is the result of a call, or its message."""
