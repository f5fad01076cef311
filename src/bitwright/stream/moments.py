"""Second moments of a linear's inputs on both streams, for closed forms of the range and the rounding."""

from collections.abc import Mapping
from typing import Any

import torch

from bitwright.core.block import Block
from bitwright.core.method import Moments
from bitwright.core.scheme import Scheme
from bitwright.steps.activations import quantized_activations
from bitwright.steps.apply import Folded
from bitwright.stream.activations import Activations
from bitwright.stream.forward import TOKENS_PER_PASS, call_of


@torch.no_grad()
def moments(
    block: Block,
    linear: str,
    folded: Folded,
    scheme: Scheme,
    inputs: Activations,
    kwargs: Mapping[str, Any],
    *,
    drift: bool,
) -> Moments:
    """H = E[x' x'^T] and C = E[(x - x') x'^T] [I, I] of a linear's input, in float32.

    x is the input on the full-precision stream, through the transformed block; x' the input on the quantized stream,
    through the block as folded, with its activations quantized. Without drift C is zero.
    """
    place = next(block.module.parameters())
    full, written = (
        {name: p.to(place) for name, p in parameters.items()} for parameters in (folded.full, folded.written())
    )
    count, rows = len(inputs.quantized), max(1, TOKENS_PER_PASS // inputs.quantized.shape[1])
    features = block.weight(linear).shape[1]
    second, cross = (torch.zeros(features, features, device=place.device) for _ in range(2))
    for start in range(0, count, rows):
        here = slice(start, start + rows)
        with quantized_activations(block, scheme):
            read = call_of(block, linear, written, inputs.quantized[here].to(place), kwargs)[0].flatten(0, -2).float()
        second.addmm_(read.T, read)
        if drift:
            x = call_of(block, linear, full, inputs.reference[here].to(place), kwargs)[0].flatten(0, -2).float()
            cross.addmm_((x - read).T, read)
    tokens = inputs.quantized[..., 0].numel()
    return Moments(second / tokens, cross / tokens)
