"""The two streams of activations: through the full-precision blocks, and through the quantized ones."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bitwright.core.block import Block
from bitwright.core.method import Activations
from bitwright.stream.skeleton import Recorder, Skeleton

TOKENS_PER_PASS = 2048


@dataclass(frozen=True)
class Stream:
    """Activations on their way through the blocks, and each block's keyword arguments (masks, rotary positions)."""

    activations: Activations
    kwargs: list[dict[str, Any]]


@dataclass(frozen=True)
class StreamErrors:
    """Relative squared errors: of each linear's output on the reference inputs, and of the block's output."""

    linears: Mapping[str, float]
    block: float


@torch.no_grad()
def enter(skeleton: Skeleton, tokens: Int[Tensor, "N T"]) -> Stream:
    """What the first block reads.

    The model's own forward pass runs with recorders in the blocks' place, so that everything in front of the
    blocks is transformers' own code. It runs sequence by sequence, so masks and positions broadcast over a batch.
    """
    decoder_name, _, leaf = skeleton.family.blocks.rpartition(".")
    decoder = skeleton.model.get_submodule(decoder_name)
    blocks = decoder.get_submodule(leaf)
    recorders = [Recorder(block) for block in blocks.children()]
    setattr(decoder, leaf, nn.ModuleList(recorders))
    try:
        hidden = []
        with skeleton.materialised(decoder_name):
            for ids in tokens:
                decoder(input_ids=ids[None].to(skeleton.device), use_cache=False)
                assert recorders[0].hidden is not None
                hidden.append(recorders[0].hidden.cpu())
    finally:
        setattr(decoder, leaf, blocks)
    inputs = torch.cat(hidden)
    return Stream(Activations(inputs, inputs), [r.kwargs for r in recorders])


@torch.no_grad()
def advance(block: Block, quantized: Mapping[str, Float[Tensor, "O I"]], stream: Stream) -> tuple[Stream, StreamErrors]:
    """Both streams after a block, and the errors that its quantized weights make."""
    kwargs = stream.kwargs[block.index] if block.index < len(stream.kwargs) else {}
    with _measured(block, quantized) as sums:
        reference = _forward(block.module, stream.activations.reference, kwargs)
    with _substituted(block, quantized):
        outputs = _forward(block.module, stream.activations.quantized, kwargs)
    linears = {name: _ratio(error, signal) for name, (error, signal) in sums.items()}
    errors = StreamErrors(linears, _ratio(_squares(outputs - reference), _squares(reference)))
    return Stream(Activations(reference, outputs), stream.kwargs), errors


def _forward(module: nn.Module, inputs: Float[Tensor, "N T D"], kwargs: dict[str, Any]) -> Float[Tensor, "N T D"]:
    device = next(module.parameters()).device
    outputs = []
    for batch in inputs.split(max(1, TOKENS_PER_PASS // inputs.shape[1])):
        result = module(batch.to(device), **kwargs)
        outputs.append((result[0] if isinstance(result, tuple) else result).cpu())
    return torch.cat(outputs)


@contextmanager
def _measured(block: Block, quantized: Mapping[str, Tensor]) -> Iterator[dict[str, tuple[float, float]]]:
    """While it lasts, every linear adds up the squares of its output's error and of its output, biases left out."""
    sums = dict.fromkeys(quantized, (0.0, 0.0))
    hooks = []
    for name, weight in quantized.items():
        linear = block.linear(name)
        difference = weight.to(linear.weight) - block.weight(name)

        def add(module: nn.Linear, args: tuple[Tensor], y: Tensor, name: str = name, d: Tensor = difference) -> None:
            error, signal = sums[name]
            bias: Tensor | None = module.bias
            product = y if bias is None else y - bias
            sums[name] = error + _squares(nn.functional.linear(args[0], d)), signal + _squares(product)

        hooks.append(linear.register_forward_hook(add))
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _substituted(block: Block, weights: Mapping[str, Tensor]) -> Iterator[None]:
    originals = {name: block.linear(name).weight for name in weights}
    for name, weight in weights.items():
        block.linear(name).weight = nn.Parameter(weight.to(originals[name]), requires_grad=False)
    try:
        yield
    finally:
        for name, original in originals.items():
            block.linear(name).weight = original


def _squares(values: Tensor) -> float:
    return (
        float(values.double().square().sum()) if values.numel() < 2**16 else float(values.float().norm().double() ** 2)
    )


def _ratio(error: float, signal: float) -> float:
    return error / signal if signal > 0 else 0.0 if error == 0 else float("inf")
