"""Folders that transformers alone cannot load (gptq and awq, which it leaves to gptqmodel), read and made dense."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from bitwright.checkpoint.reader import Checkpoint
from bitwright.formats import CONFIG, QuantizedFolder

MADE_DENSE = ("gptq", "awq")
"""quant_method of folders that are read and not handed on."""


def is_made_dense(checkpoint: Checkpoint) -> bool:
    """Whether a folder is loaded through its dequantized weights."""
    said = checkpoint.config.get(CONFIG)
    return isinstance(said, dict) and said.get("quant_method") in MADE_DENSE


def dense_tensors(folder: Path, dtype: torch.dtype) -> Mapping[str, Tensor]:
    """Every tensor of a quantized folder by its name in an ordinary one, linears as ``(code - zero) * scale``, computed
    in float32 and given in ``dtype``. Raises CheckpointError."""
    found = QuantizedFolder.open(folder)
    tensors = {name: found.tensor(name) for name in found.passed}
    return tensors | {f"{x}.weight": found.read(x).dequantize(torch.float32).to(dtype) for x in found.linears}
