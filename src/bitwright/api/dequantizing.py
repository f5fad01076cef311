"""Folders that transformers alone cannot load (gptq and awq, which it leaves to gptqmodel), read and made dense."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bitwright.checkpoint.reader import Checkpoint
from bitwright.evaluation.loading import load_model
from bitwright.formats import CONFIG, QuantizedFolder
from bitwright.steps.activations import quantize_activations

MADE_DENSE = ("gptq", "awq")
"""quant_method of folders that are read and not handed on."""


def is_made_dense(checkpoint: Checkpoint) -> bool:
    """Whether a folder is loaded through its dequantized weights."""
    said = checkpoint.config.get(CONFIG)
    return isinstance(said, dict) and said.get("quant_method") in MADE_DENSE


def dense_tensors(folder: Path, dtype: torch.dtype) -> Mapping[str, Tensor]:
    """Every tensor of a quantized folder by its name in an ordinary one, linears as ``(code - zero) * scale``, computed
    in float32 and given in ``dtype``. Raises CheckpointError."""
    return _dense(QuantizedFolder.open(folder), dtype)


def load_codes(model: QuantizedFolder) -> PreTrainedModel:
    """The model of a quantized folder by our own reading of its codes: dense, in float32, on the CPU.

    Activations and KV cache are quantized as the folder says. Raises CheckpointError.
    """
    loaded = load_model(model.folder, torch.float32, torch.device("cpu"), _dense(model, torch.float32))
    if model.described is not None:
        quantize_activations(loaded, model.described.activations, model.described.kv, model.linears)
    return loaded


def _dense(model: QuantizedFolder, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = {name: model.tensor(name) for name in model.passed}
    for name in model.linears:
        tensors[f"{name}.weight"] = model.read(name).dequantize(torch.float32).to(dtype)
    return tensors
