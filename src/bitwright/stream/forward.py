"""One block's forward pass: the real transformers module with other parameters and quantized activations put in."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bitwright.core.block import Block
from bitwright.core.fake_quant import fake_quantize_tokens
from bitwright.core.scheme import Grid, Scheme

TOKENS_PER_PASS = 2048
QUANTIZED_ATTENTION = "bitwright_quantized"
GRIDS = "_bitwright_grids"


def forward(
    block: Block, parameters: Mapping[str, Tensor], inputs: Float[Tensor, "N T D"], kwargs: Mapping[str, Any]
) -> Float[Tensor, "N T D"]:
    """The block's output with some parameters replaced; differentiable."""
    result = functional_call(block.module, dict(parameters), (inputs,), dict(kwargs))
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output


@torch.no_grad()
def forward_all(
    block: Block, parameters: Mapping[str, Tensor], inputs: Float[Tensor, "N T D"], kwargs: Mapping[str, Any]
) -> Float[Tensor, "N T D"]:
    """The block's outputs for many segments, a few at a time; kept on the CPU."""
    place = next(block.module.parameters())
    given = {name: p.to(place) for name, p in parameters.items()}
    rows = max(1, TOKENS_PER_PASS // inputs.shape[1])
    outputs = torch.empty(0)
    for start in range(0, len(inputs), rows):
        batch = forward(block, given, inputs[start : start + rows].to(place.device), kwargs)
        if start == 0:  # filled in place: a list of batches would be a second copy of the stream when it is joined
            outputs = torch.empty((len(inputs), *batch.shape[1:]), dtype=batch.dtype)
        outputs[start : start + rows] = batch
    return outputs


@contextmanager
def quantized_activations(block: Block, scheme: Scheme) -> Iterator[None]:
    """While it lasts, every linear's input is quantized per token, and queries, keys and values per token and head.

    Queries, keys and values go through transformers' own attention interface, after the rotary embedding; the
    softmax output is left alone.
    """
    hooks = []
    if scheme.activations is not None:
        for group in block.topology.groups:
            hook = _input_hook(scheme.activations)
            hooks += [block.linear(name).register_forward_pre_hook(hook) for name in group.linears]
    with _quantized_attention(block.module, scheme):
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _input_hook(grid: Grid) -> Any:
    """Linears that share an input share its quantization: the hook keeps the last one, by the tensor itself."""
    last: list[Tensor] = []

    def quantize(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        if not (last and last[0] is args[0]):
            last[:] = [args[0], fake_quantize_tokens(args[0], grid)]
        return (last[1],)

    return quantize


@contextmanager
def _quantized_attention(module: nn.Module, scheme: Scheme) -> Iterator[None]:
    """Every attention module notes its grids; the block's configuration names our attention function meanwhile."""
    attention = [m for m in module.modules() if hasattr(m, "config") and hasattr(m, "scaling")]
    if (scheme.kv is None and scheme.activations is None) or not attention:
        yield
        return
    config: Any = attention[0].config
    original = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register(QUANTIZED_ATTENTION, _attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(QUANTIZED_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS[original])
    for m in attention:
        setattr(m, GRIDS, (scheme.activations, scheme.kv, original))
    config._attn_implementation = QUANTIZED_ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = original
        for m in attention:
            delattr(m, GRIDS)


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    of_query, of_cache, original = getattr(module, GRIDS)
    if of_query is not None:
        query = fake_quantize_tokens(query, of_query)
    if of_cache is not None:
        key, value = fake_quantize_tokens(key, of_cache), fake_quantize_tokens(value, of_cache)
    return ALL_ATTENTION_FUNCTIONS[original](module, query, key, value, *args, **kwargs)
