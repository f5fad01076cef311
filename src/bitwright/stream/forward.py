"""The forward pass of one block: transformers' own module, with other parameters."""

from collections.abc import Iterator, Mapping
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from bitwright.core.block import Block

TOKENS_PER_PASS = 2048  # bounds the activations of one pass


def forward(
    block: Block, parameters: Mapping[str, Tensor], inputs: Float[Tensor, "N T D"], kwargs: Mapping[str, Any]
) -> Float[Tensor, "N T D"]:
    """The block's output with some parameters replaced; differentiable."""
    result = functional_call(block.module, dict(parameters), (inputs,), dict(kwargs))
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output


class _Reached(Exception):
    """An exception that ends the forward pass when a module is reached."""


@torch.no_grad()
def call_of(
    block: Block,
    module: str,
    parameters: Mapping[str, Tensor],
    inputs: Float[Tensor, "N T D"],
    kwargs: Mapping[str, Any],
) -> tuple[Float[Tensor, "N T I"], dict[str, Any]]:
    """The input of one module of the block, and the other arguments of its call; the block runs only up to it."""
    called = block.module.get_submodule(module)
    arguments: dict[str, Any] = {}

    def stop(_: nn.Module, args: tuple[Any, ...], others: dict[str, Any]) -> None:
        arguments.update(signature(called.forward).bind(*args, **others).arguments)
        arguments.update(arguments.pop("kwargs", {}))  # arguments that went into forward's own **kwargs
        raise _Reached

    hook = called.register_forward_pre_hook(stop, with_kwargs=True, prepend=False)
    try:
        forward(block, parameters, inputs, kwargs)
    except _Reached:
        first = next(iter(signature(called.forward).parameters))
        return arguments.pop(first), arguments
    finally:
        hook.remove()
    raise AssertionError(f"{module} was not reached")


@torch.no_grad()
def forward_batches(
    block: Block, parameters: Mapping[str, Tensor], inputs: Float[Tensor, "N T D"], kwargs: Mapping[str, Any]
) -> Iterator[tuple[slice, Float[Tensor, "B T D"]]]:
    """Yield the block's outputs for many segments in batches: the rows of a batch, and the batch on the CPU."""
    place = next(block.module.parameters())
    placed = {name: p.to(place) for name, p in parameters.items()}
    rows = max(1, TOKENS_PER_PASS // inputs.shape[1])
    for start in range(0, len(inputs), rows):
        here = slice(start, start + rows)
        yield here, forward(block, placed, inputs[here].to(place.device), kwargs).cpu()


@torch.no_grad()
def forward_all(
    block: Block,
    parameters: Mapping[str, Tensor],
    inputs: Float[Tensor, "N T D"],
    kwargs: Mapping[str, Any],
    *,
    in_place: bool = False,
) -> Float[Tensor, "N T D"]:
    """The block's outputs for many segments, kept on the CPU.

    ``in_place`` overwrites the inputs with them if shape and dtype allow it.
    """
    outputs = inputs if in_place else torch.empty(0)
    for here, batch in forward_batches(block, parameters, inputs, kwargs):
        if here.start == 0 and (outputs.shape[1:], outputs.dtype) != (batch.shape[1:], batch.dtype):
            # One tensor that is filled: joining a list of batches would need a second copy of the stream.
            outputs = torch.empty((len(inputs), *batch.shape[1:]), dtype=batch.dtype)
        outputs[here] = batch
    return outputs
