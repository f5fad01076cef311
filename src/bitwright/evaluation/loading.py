"""A written folder, as its users load it: plain transformers, offline, no remote code."""

from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from bitwright.core.errors import CheckpointError


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model in a folder, ready to run, its weights (and scales) in ``dtype``.

    Raises CheckpointError where transformers refuses it, and where weights are missing: transformers would go on with
    random ones.
    """
    logging.disable_progress_bar()
    try:
        with redirect_stderr(StringIO()):  # bars of compressed-tensors, one per model, that cannot be switched off
            found: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except CheckpointError:
        raise
    except Exception as error:  # a damaged folder ends in whatever the libraries trip over
        raise CheckpointError(f"transformers cannot load {folder}: {type(error).__name__}: {error}") from error
    loaded: PreTrainedModel = found[0]
    missing = sorted(found[1]["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{folder} has no weights for {missing[0]} and {len(missing) - 1} others; transformers would make them up. "
            "Quantize the model again, or download the folder again"
        )
    loaded.eval()
    torch.nn.Module.to(loaded, device)
    if hasattr(loaded, "ct_decompress_hook"):  # the first forward pass decompresses, with a bar of its own
        with redirect_stderr(StringIO()), torch.inference_mode():
            loaded(torch.zeros(1, 1, dtype=torch.int64, device=device))
    return loaded
