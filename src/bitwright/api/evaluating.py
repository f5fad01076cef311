"""evaluate(): the numbers of a written folder, as its users load it."""

from dataclasses import dataclass
from pathlib import Path

import torch

from bitwright.api.loading import left_out, load
from bitwright.api.source import (
    check_vocabulary,
    model_config,
    open_checkpoint,
    pick_device,
    pick_dtype,
    sequence_length,
    text_of,
    tokenize,
)
from bitwright.core.errors import UserError
from bitwright.core.progress import Listener, silent
from bitwright.evaluation.measure import Measurement, measure
from bitwright.evaluation.windows import consecutive


@dataclass(frozen=True)
class Evaluation:
    """A measurement, and what it was made of: the folder, the text, the dtype of the arithmetic, bytes on disk.

    ``loader`` is "transformers", or "bitwright" where queries are quantized that the folder's config leaves out.
    """

    folder: str
    text: str
    reference: str | None
    loader: str
    dtype: str
    device: str
    weight_bytes: int
    measurement: Measurement


def evaluate(
    folder: Path | str,
    text: str = "builtin",
    *,
    seqlen: int | None = None,
    windows: int | None = None,
    reference: Path | str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    listener: Listener = silent,
) -> Evaluation:
    """Perplexity of a folder, original or quantized, by the papers' protocol; with a reference also its divergence.

    Raises UserError. ``seqlen`` None is 2048 tokens or the model's own maximum; ``windows`` None is the whole text.
    """
    folder = Path(folder)
    checkpoint = open_checkpoint(folder)
    config = model_config(folder)
    length = sequence_length(seqlen, config)
    where = pick_device(device)
    arithmetic = pick_dtype(dtype, where, checkpoint.dtype_of_weights)
    if reference is not None:
        _check_reference(Path(reference), config.vocab_size)
    tokens = tokenize(folder, text_of(text, "evaluation"))
    check_vocabulary(tokens, config, folder)
    cut = consecutive(tokens, length, windows, text)
    model = load(folder, device=str(where), dtype=dtype)
    original = None if reference is None else load(reference, device=str(where), dtype=_name(arithmetic))
    measured = measure(model, cut, original, listener=listener)
    return Evaluation(
        folder=str(folder),
        text=text,
        reference=None if reference is None else str(reference),
        loader="transformers" if left_out(folder) is None else "bitwright",
        dtype=_name(arithmetic),
        device=str(where),
        weight_bytes=checkpoint.total_bytes,
        measurement=measured,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_reference(folder: Path, vocabulary: int) -> None:
    """Refuses a reference that cannot be the original before the text is read and anything is loaded."""
    open_checkpoint(folder)
    found = model_config(folder).vocab_size
    if found != vocabulary:
        raise UserError(
            f"the reference {folder} has a vocabulary of {found}, the model one of {vocabulary}; "
            "the reference must be the model that was quantized"
        )
