"""What MLC-LLM's own quantizer makes of a model's linears, to compare with: a reference, in numpy terms.

For each group of a preset, off = 2^(b-1) - 1:  scale = max|W| / off,  code = clamp(round(W / scale + off), 0, 2 off),
so that one code of the grid is never used.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bitwright.core.qtensor import packed_bits, tiled, whole
from bitwright.core.scheme import Scheme


def as_mlc_quantizes(model: Path, scheme: str, output: Path) -> float:
    """Write the model with its blocks' linears as they would be computed; bits per weight as our rows have them."""
    asked, bits, weights = Scheme.parse(scheme), 0, 0
    shutil.copytree(model, output)
    for path in output.glob("*.safetensors"):
        tensors = load_file(path)
        for name, weight in tensors.items():
            if ".layers." in name and weight.dim() == 2:
                tensors[name] = quantized(weight.float(), asked)
                shape = (weight.shape[0], weight.shape[1])
                bits += packed_bits(shape, asked.weight, asked.tile, torch.float16)
                weights += weight.numel()
        save_file(tensors, path, metadata={"format": "pt"})
    return bits / weights


def quantized(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """A weight [N, K] in float16 arithmetic, as MLC stores and computes it."""
    off, tiles = -scheme.weight.qmin, tiled(weight.half(), scheme.tile)
    scale = (tiles.abs().amax((1, 3), keepdim=True) / off).clamp(min=2**-24)
    codes = (tiles / scale + off).round().clamp(0, 2 * off)
    return whole((codes - off) * scale, weight.shape)
