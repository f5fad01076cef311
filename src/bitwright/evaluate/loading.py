"""A written folder, as its users load it: plain transformers, offline, no remote code."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from bitwright.core.errors import CheckpointError


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model in a folder, ready to run, its weights (and scales) in ``dtype``."""
    logging.disable_progress_bar()
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise CheckpointError(f"transformers cannot load {folder}: {type(error).__name__}: {error}") from error
    model.eval()
    torch.nn.Module.to(model, device)
    return model
