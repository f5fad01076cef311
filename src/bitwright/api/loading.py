"""load(): a written folder as a transformers model, with the part of its scheme that its config could not say."""

from pathlib import Path
from typing import TYPE_CHECKING

from bitwright.api.dequantizing import dense_tensors, is_made_dense
from bitwright.api.report_file import account_of
from bitwright.api.source import open_checkpoint, pick_device, pick_dtype
from bitwright.core.errors import SchemeError
from bitwright.core.registry import find, names
from bitwright.core.scheme import Grid, Scheme
from bitwright.steps.activations import quantize_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(folder: Path | str, *, device: str = "auto", dtype: str = "auto") -> "PreTrainedModel":
    """The model in a folder, original or quantized, ready to run; offline, no remote code.

    Plain transformers loads it, the bitwright format through our plugin: packed weights stay packed in memory. Folders
    in gptq and awq are read by Bitwright and dense in memory. Queries that the folder's config leaves out are quantized
    on top (``W4A8KV4``).
    ``dtype`` "auto" is the checkpoint's own where the device is fast with it. Raises CheckpointError.
    """
    from bitwright.evaluation.loading import load_model  # imports transformers, which reading an account does without

    folder = Path(folder)
    where, checkpoint = pick_device(device), open_checkpoint(folder)
    arithmetic = pick_dtype(dtype, where, checkpoint.dtype_of_weights)
    tensors = dense_tensors(folder, arithmetic) if is_made_dense(checkpoint) else None
    model = load_model(folder, arithmetic, where, tensors)
    quantize_attention(model, left_out(folder), None)
    return model


def left_out(folder: Path) -> Grid | None:
    """The grid of the queries where the folder's config could not hold it; see ``formats``."""
    account = account_of(folder)
    try:
        scheme = Scheme.parse(str(account.get("scheme")))
        name = account.get("format") or account["recipe"]["format"]  # folders of Bitwright 0.1.0 say it there alone
    except (SchemeError, KeyError, TypeError):
        return None
    if name not in names("formats"):
        return None
    grid: Grid | None = find("formats", name).queries_left_out(scheme)
    return grid
