"""The differences between two trees that are meant, each with its reason and a check of its values.

To allow one more, add a line: the exact key, and a check that lets nothing else pass.
"""

import re
from math import isclose
from pathlib import Path

from compare_cases import OUTCOME, Case
from compare_checks import (
    along_the_output,
    bits_of_model,
    bytes_of_weights,
    full_bits,
    groups_of_forty,
    matrices_left_alone,
    outliers_lost,
    real_schemes,
    schemes_of_linears,
    stored_bits,
)
from compare_child import FILE, FOLDER
from compare_files import ABSENT, Allowed, Difference

WORDS = (
    ("methods that see a text lose less", "methods that see calibration data lose less"),
    ("needs no calibration text; it is used to", "needs no calibration data; they are used to"),
    ("learns from text and none was named", "learns from calibration data and none were named"),
    ("[sym|asym], for example", "[sym|asym|real], for example"),
    ("in groups along the input, the same for all linears. Leave", "in groups along the input. Leave"),
    ("symmetric or not, and 8 bits", "symmetric or not (2 to 4 with a real-valued zero), and 8 bits"),
    ("Known: llama, opt.", "Known: llama, mistral, opt, qwen2, qwen3."),
    ("asymmetric weight in tiles of", "asymmetric weight [128, 256] in tiles of"),
    ("down_proj: a weight in tiles of", "down_proj: a 3-bit asymmetric weight [128, 256] in tiles of"),
    ("of scheme W4A4KV4, which", "of scheme W4A4, which"),
    ("One short file in families/ describes a new one; rtn and easyquant, without --calibration, do with any",
     "Methods that need no description quantize any architecture: --method rtn or --method easyquant, without "
     "--calibration"),
    ("'import bitwright'). Or leave", "'import bitwright') or --format dense. Or leave"),
    ("format gguf holds weights alone, and scheme W4A4 quantizes activations or KV cache too; take W4A16, or --format "
     "compressed-tensors", "format gguf cannot hold the activations or KV cache of scheme W4A4; use format "
     "compressed-tensors or bitwright, or a scheme with A16"),
)  # fmt: skip
"""Parts of notes and refusals, as they were worded and as they are."""
ADDED = r"The nearest scheme that it holds is \S+\. "
"""What refusals say besides."""
LOADS = ("; loads in transformers", "; loads decoded by Bitwright, not in its own client")
"""The ends of what was verified, if the folder was also loaded."""


def none_is_new(difference: Difference, case: Case, outputs: Path) -> bool:
    """Whether a key is new, and nothing was asked for it."""
    return difference.before is ABSENT and difference.after is None


def data_without_beginning(difference: Difference, case: Case, outputs: Path) -> bool:
    """Whether calibration data are said besides, whose segments begin with nothing of the tokenizer's."""
    data = difference.after
    return difference.before is ABSENT and (data is None or (isinstance(data, dict) and data["begins_with"] is None))


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


def also_loaded(difference: Difference, case: Case, outputs: Path) -> bool:
    """Whether a folder of an architecture without a description was loaded besides, before it was published."""
    model = case.model or case.source.partition("/")[0]
    return model in ("experts", "fused") and difference.after in [f"{difference.before}{end}" for end in LOADS]


def nothing_left(difference: Difference, case: Case, outputs: Path) -> bool:
    """Whether a call that was refused left a work folder, and leaves none now."""
    work = difference.file.partition("/")[0]
    return work in (f"{FOLDER}.partial", f"{FILE}.partial") and not (outputs / case.name / work).exists()


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


BEGINNING = "calibration data have fields, and say what each segment begins with"
BITS = "bits are those that the format stores"
BYTES = "sizes are those of weight files, also of exports and of MLC"
WHOLE = "bits of the whole model, and what stays in full precision, are said"
SCHEMES = "the schemes of linears are said"
EXPORTED = "an export says what its linears are, not those that it read"
ORDER = "linears of described architectures are listed in the order of the block"
ROWS = "a group that is a whole row is said to be one of the groups that the other linears have"
WORDING = "notes and refusals are worded anew"
LOADED = "architectures without a description are loaded before they are published"
ALLOWED = (
    Allowed(SCHEMES, "<file>", schemes_of_linears, file="allocation.json"),
    Allowed(SCHEMES, "recipe.allocation", none_is_new),
    Allowed(SCHEMES, "recipe.scheme_for", none_is_new),
    Allowed(BEGINNING, "recipe.text_field", none_is_new),
    Allowed(BEGINNING, "calibration.begins_with", none_is_new),
    Allowed(BEGINNING, "result.calibration", data_without_beginning, file=OUTCOME),
    Allowed(BEGINNING, "result.begins_with", none_is_new, file=OUTCOME),
    Allowed(EXPORTED, "scheme", real_schemes, case="export/*"),
    Allowed(EXPORTED, "blocks.*.linears.*.scheme", real_schemes, case="export/*"),
    Allowed(EXPORTED, "blocks.*.linears.*.tile.*", real_schemes, case="export/*"),
    Allowed(EXPORTED, "blocks.*.linears.*.outlier*", outliers_lost, case="export/*"),
    Allowed(EXPORTED, "totals.outliers", outliers_lost, case="export/*"),
    Allowed(EXPORTED, "totals.per_ic", along_the_output, case="export/*"),
    Allowed(BITS, "blocks.*.linears.*.storage_bits", stored_bits),
    Allowed(BITS, "blocks.*.linears.*.bits_per_weight", stored_bits),
    Allowed(BITS, "blocks.*.linears.*.storage_bits", groups_of_forty, case="settings/mlc_three_bits"),
    Allowed(BITS, "blocks.*.linears.*.bits_per_weight", groups_of_forty, case="settings/mlc_three_bits"),
    Allowed(BITS, "totals.bits_per_weight", stored_bits),
    Allowed(BITS, "result.bits_per_weight", stored_bits, file=OUTCOME),
    Allowed(BYTES, "totals.bytes_out", bytes_of_weights),
    Allowed(BYTES, "result.bytes_out", bytes_of_weights, file=OUTCOME),
    Allowed(BYTES, "result.bytes_in", bytes_of_weights, OUTCOME, "*export*"),
    Allowed(WHOLE, "result.model_bits_per_weight", bits_of_model, file=OUTCOME),
    Allowed(WHOLE, "result.full_bits", full_bits, file=OUTCOME),
    Allowed(WHOLE, "result.left_alone", matrices_left_alone, file=OUTCOME),
    Allowed(LOADED, "verified", also_loaded),
    Allowed(LOADED, "result.verified", also_loaded, file=OUTCOME),
    Allowed("a call that is refused leaves no work folder", "<file>", nothing_left, "*", "refused/*"),
    Allowed(WORDING, "notes.*", reworded),
    Allowed(WORDING, "result.notes.*", reworded, file=OUTCOME),
    Allowed(WORDING, "refused", reworded, file=OUTCOME),
    Allowed("units on their way when a run is killed", "result.resumed", one_more_or_less, OUTCOME, "killed/*"),
    Allowed(ORDER, "<order>.*", in_another_order, case="*qwen2/*"),
    Allowed(ORDER, "<bytes>", in_another_order, "config.json", "qwen2/easyquant/default"),
    Allowed(ROWS, "quantization_config.weights.tile.1", group_is_row, "*.json", "export/small/rtn/default/bitwright"),
    Allowed(ROWS, "quantization_config.exceptions.*", group_is_row, "*.json", "export/small/rtn/default/bitwright"),
    Allowed("sums in another order", "blocks.*.linears.*.weight_error", rounded),
)
"""Differences that may be. ``outcome.json`` is the result of a call, or its message."""
