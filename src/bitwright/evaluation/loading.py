"""A written folder, as its users load it: plain transformers, offline, no remote code; or tensors made from one."""

from collections.abc import Mapping
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from bitwright.core.errors import CheckpointError


def load_model(
    folder: Path, dtype: torch.dtype, device: torch.device, tensors: Mapping[str, Tensor] | None = None
) -> PreTrainedModel:
    """The model in a folder, ready to run, its weights (and scales) in ``dtype``; made of ``tensors``, where these are
    given, and not of those in the folder.

    Raises CheckpointError where transformers refuses it, and where weights are missing: transformers would go on with
    random ones.
    """
    logging.disable_progress_bar()
    try:
        with redirect_stderr(StringIO()):  # bars of compressed-tensors, one per model, that cannot be switched off
            found = _loaded(folder, dtype) if tensors is None else _made(folder, dtype, tensors)
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


def _loaded(folder: Path, dtype: torch.dtype) -> Any:
    """The model and what transformers says of the loading."""
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )


def _made(folder: Path, dtype: torch.dtype, tensors: Mapping[str, Tensor]) -> Any:
    """The same of tensors in memory: the folder's config, without its quantization_config where it has one."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    found = kind.from_pretrained(None, config=config, state_dict=dict(tensors), dtype=dtype, output_loading_info=True)
    if (folder / "generation_config.json").is_file():
        found[0].generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return found
