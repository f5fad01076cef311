"""What the steps of a training multiply in: the short dtype where the hardware is fast with it."""

import torch

from bitwright.model.source import DTYPES


def pick_arithmetic(name: str, device: torch.device, held: torch.dtype) -> torch.dtype:
    """The dtype that ``precision`` names (``core/settings.py``), for blocks that are held in another on a device.

    ``auto`` is bfloat16 on a CPU with instructions for it, and elsewhere the dtype the blocks are held in.
    """
    if name != "auto":
        return DTYPES[name]
    return torch.bfloat16 if device.type == "cpu" and multiplies_bfloat16() else held


def name_of(dtype: torch.dtype) -> str:
    """``bfloat16`` of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products in bfloat16 (AVX512_BF16, AMX), and torch the library for them.

    Without them torch computes such products too, slower than in float32. A torch that cannot tell counts as one
    without.
    """
    asked = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return torch.backends.mkldnn.is_available() and any(tells is not None and tells() for tells in asked)
