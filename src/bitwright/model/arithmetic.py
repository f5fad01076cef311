"""The arithmetic of training steps: a short dtype if the hardware is fast with it."""

import torch

from bitwright.model.source import DTYPES


def pick_arithmetic(name: str, device: torch.device, held: torch.dtype) -> torch.dtype:
    """The dtype that ``precision`` names (``core/training.py``), for blocks that ``device`` holds in dtype ``held``.

    ``auto`` is bfloat16 on a CPU with instructions for it, and elsewhere ``held``.
    """
    if name != "auto":
        return DTYPES[name]
    return torch.bfloat16 if device.type == "cpu" and multiplies_bfloat16() else held


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype without its module: ``bfloat16`` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 products (AVX512_BF16, AMX), and torch the library for them.

    Without both, torch computes such products more slowly than in float32. If torch cannot tell, the answer is no.
    """
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return torch.backends.mkldnn.is_available() and any(check is not None and check() for check in checks)
