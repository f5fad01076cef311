"""One block's forward pass: the real transformers module with other parameters put in."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from bitwright.core.block import Block

TOKENS_PER_PASS = 2048


def forward(
    block: Block, parameters: Mapping[str, Tensor], inputs: Float[Tensor, "N T D"], kwargs: Mapping[str, Any]
) -> Float[Tensor, "N T D"]:
    """The block's output with some parameters replaced; differentiable."""
    result = functional_call(block.module, dict(parameters), (inputs,), dict(kwargs))
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output


class _Reached(Exception):
    """The linear was reached; what comes after it is not wanted."""


@torch.no_grad()
def input_of(
    block: Block,
    linear: str,
    parameters: Mapping[str, Tensor],
    inputs: Float[Tensor, "N T D"],
    kwargs: Mapping[str, Any],
) -> Float[Tensor, "N T I"]:
    """What one linear of the block reads; the block runs no further than that."""
    seen: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Tensor]) -> None:
        seen.append(args[0])
        raise _Reached

    hook = block.linear(linear).register_forward_pre_hook(stop)
    try:
        forward(block, parameters, inputs, kwargs)
    except _Reached:
        return seen[0]
    finally:
        hook.remove()
    raise AssertionError(f"{linear} was not reached")


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
