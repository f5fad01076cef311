"""The arithmetic of training steps: matrix products in a short dtype, everything else in float32.

Masters, fake quantization, norms, the residual path and the loss stay in float32; the inputs of linears and attention
are rounded to the short dtype. This is torch's autocast with two additions. Weights are in the short dtype already
(``core/fake_quant.py`` writes them so). Attention over few tokens is computed as two products and a softmax, because
torch's fused attention for CPUs takes twice as long.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bitwright.core.block import Block

WRITTEN_OUT = "bitwright_written_out"
MOST_SCORES = 2**22
"""Above this number of attention scores in one step, the fused attention stays: it never holds them all."""


def pick_arithmetic(name: str, device: torch.device, held: torch.dtype) -> torch.dtype:
    """Choose the dtype that training multiplies in.

    ``name`` is the setting ``precision`` (``core/training.py``), ``held`` the dtype of the blocks on ``device``.

    ``auto`` is bfloat16 on a CPU with instructions for it, and elsewhere ``held``.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    return torch.bfloat16 if device.type == "cpu" and multiplies_bfloat16() else held


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 products (AVX512_BF16, AMX), and torch the library for them.

    Without both, torch computes such products more slowly than in float32. If torch cannot tell, the answer is no.
    """
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return torch.backends.mkldnn.is_available() and any(check is not None and check() for check in checks)


def running_dtype(block: torch.dtype, arithmetic: torch.dtype) -> torch.dtype:
    """The dtype in which a block of dtype ``block`` runs, if its products are computed in ``arithmetic``."""
    return block if block == arithmetic else torch.float32


def rounding_inputs(device: torch.device, arithmetic: torch.dtype) -> Any:
    """A context in which matrix products round their inputs to the dtype; it does nothing for float32."""
    return nullcontext() if arithmetic == torch.float32 else torch.autocast(device.type, arithmetic)


MORE_THAN_PLAIN = ("softcap", "s_aux", "sinks", "position_bias")
"""Arguments of attention that make it more than two products and a softmax."""


@contextmanager
def written_out_attention(block: Block, arithmetic: torch.dtype) -> Iterator[None]:
    """A context: if a CPU computes in a short dtype, attention over few tokens is two products and a softmax."""
    attention = [m for m in block.module.modules() if hasattr(m, "config") and hasattr(m, "scaling")]
    place = block.device
    if arithmetic == torch.float32 or place.type != "cpu" or not attention:
        yield
        return
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS  # takes seconds, so only if it is needed
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config: Any = attention[0].config
    original = config._attn_implementation
    fused: Any = ALL_ATTENTION_FUNCTIONS.get(original)
    if fused is None:  # eager: the model has a function of its own, with whatever its attention has besides
        yield
        return

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
        plain = mask is None and q.shape[2] == k.shape[2] and getattr(module, "is_causal", False)
        if not plain or scores > MOST_SCORES or any(kwargs.get(name) is not None for name in MORE_THAN_PLAIN):
            return fused(module, q, k, v, mask, **kwargs)
        read = causal_attention(q.to(arithmetic), k.to(arithmetic), v.to(arithmetic), module.scaling)
        return read.contiguous(), None  # as transformers' own functions return it

    ALL_ATTENTION_FUNCTIONS.register(WRITTEN_OUT, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(WRITTEN_OUT, ALL_MASK_ATTENTION_FUNCTIONS[original])
    config._attn_implementation = WRITTEN_OUT
    try:
        yield
    finally:
        config._attn_implementation = original


def causal_attention(
    q: Float[Tensor, "N H T D"], k: Float[Tensor, "N K T D"], v: Float[Tensor, "N K T E"], scaling: float
) -> Float[Tensor, "N T H E"]:
    """Compute softmax(q k^T scaling) v, in which no token reads a later one; H / K queries share a key."""
    (batch, heads, tokens, features), keys = q.shape, k.shape[1]
    later = _later(tokens, heads // keys, q.dtype)
    grouped = q.reshape(batch * keys, -1, features)
    scores = torch.baddbmm(later, grouped, k.flatten(0, 1).transpose(1, 2), alpha=scaling)
    read = torch.bmm(scores.softmax(-1), v.flatten(0, 1))
    return read.view(batch, heads, tokens, v.shape[-1]).transpose(1, 2)


@lru_cache(maxsize=1)
def _later(tokens: int, sharing: int, dtype: torch.dtype) -> Float[Tensor, "S T"]:
    """Make the causal mask: minus infinity at every later token, and 0 at all others.

    ``sharing`` queries share a key; the mask is repeated for each of them.
    """
    return torch.full((tokens, tokens), float("-inf"), dtype=dtype).triu_(1).repeat(sharing, 1)
