"""The forward pass of one block: transformers' own module, with other weights, and with taps at its linears."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call

from bitwright.core.block import Block, Place
from bitwright.core.products import Factor, Products
from bitwright.model.calls import Call, hidden_of, joined

TOKENS_PER_PASS = 2048  # bounds the activations of one pass


@dataclass(frozen=True)
class Inputs:
    """What a block is called with, for many segments of equal length; ``joins``: several can be one call."""

    calls: Sequence[Call]
    joins: bool = True

    def __len__(self) -> int:
        return len(self.calls)

    @property
    def length(self) -> int:
        """The tokens of a segment."""
        return self.calls[0].hidden.shape[-2]

    @property
    def tokens(self) -> int:
        """The tokens of all segments."""
        return len(self) * self.length

    def batches(self, rows: Sequence[int] | None = None, most: int = TOKENS_PER_PASS) -> Iterator[list[int]]:
        """The numbers of segments (all, or these) that make a pass of at most so many tokens."""
        chosen = list(range(len(self))) if rows is None else list(rows)
        size = max(1, most // self.length) if self.joins else 1
        return (chosen[start : start + size] for start in range(0, len(chosen), size))

    def call(self, rows: Sequence[int], block: Block, dtype: torch.dtype | None = None) -> Call:
        """The call for some segments, where the block is; its floating tensors in a dtype."""
        return joined([self.calls[row] for row in rows]).to(block.device, dtype)


def run(block: Block, tensors: Mapping[str, Tensor], call: Call) -> Any:
    """What the block returns with some of its tensors replaced; differentiable."""
    own = block.parameters if block.layout.linears or block.taps else {}
    changed = block.layout.parameters(tensors, own)
    with _tapped(block, {**own, **changed}):
        return functional_call(block.module, changed, call.args, dict(call.kwargs))


def forward(block: Block, tensors: Mapping[str, Tensor], call: Call) -> Float[Tensor, "N T D"]:
    """The hidden states that the block makes with some of its tensors replaced; differentiable."""
    return hidden_of(run(block, tensors, call))


class Reached(Exception):
    """An exception that ends the forward pass when enough was seen."""


@torch.no_grad()
def call_of(block: Block, module: str, tensors: Mapping[str, Tensor], call: Call) -> tuple[Tensor, dict[str, Any]]:
    """The input of one module of the block, and the other arguments of its call; the block runs only up to it."""
    called = block.module.get_submodule(module)
    arguments: dict[str, Any] = {}

    def stop(_: Any, args: tuple[Any, ...], others: dict[str, Any]) -> None:
        arguments.update(signature(called.forward).bind(*args, **others).arguments)
        arguments.update(arguments.pop("kwargs", {}))  # arguments that went into forward's own **kwargs
        raise Reached

    hook = called.register_forward_pre_hook(stop, with_kwargs=True, prepend=False)
    try:
        run(block, tensors, call)
    except Reached:
        first = next(iter(signature(called.forward).parameters))
        return arguments.pop(first), arguments
    finally:
        hook.remove()
    raise AssertionError(f"{module} was not reached")


def placed(block: Block, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors where the block is, in the dtype that it computes in."""
    return {name: tensor.to(block.device, block.dtype) for name, tensor in tensors.items()}


def segments(result: Any, calls: Sequence[Call]) -> list[Tensor]:
    """The hidden states of each segment in what a block returned, on the CPU."""
    hidden, dim = hidden_of(result), calls[0].batch_dim
    return [part.cpu() for part in hidden.split(1, dim)]


@torch.no_grad()
def outputs_of(
    block: Block, tensors: Mapping[str, Tensor], inputs: Inputs, dtype: torch.dtype | None = None
) -> Iterator[Tensor]:
    """The hidden states that the block makes of each segment, on the CPU; segments run together in batches."""
    here = placed(block, tensors)
    for rows in inputs.batches():
        result = run(block, here, inputs.call(rows, block, dtype))
        yield from segments(result, [inputs.calls[row] for row in rows])


def _tapped(block: Block, parameters: Mapping[str, Tensor]) -> AbstractContextManager[object]:
    if not block.taps:
        return nullcontext()
    linears = [linear for group in block.topology.groups for linear in group.linears]
    reading: dict[str, list[tuple[str, Place, int]]] = {}
    for linear in linears:
        start = 0
        for place in block.layout.linears.get(linear) or (_whole(block, linear, parameters),):
            reading.setdefault(place.parameter, []).append((linear, place, start))
            start += len(range(*place.rows))
    watched = {name: parameters[name] for name in reading}
    return Products(watched, partial(_before, block, reading), partial(_after, block, reading))


def _whole(block: Block, linear: str, parameters: Mapping[str, Tensor]) -> Place:
    name = block.layout.names[f"{linear}.weight"]
    return Place(name, None, (0, parameters[name].shape[0], 1))


_Reading = Mapping[str, Sequence[tuple[str, Place, int]]]


def _before(block: Block, reading: _Reading, factor: Factor, x: Tensor) -> Tensor | None:
    """Show a product's inputs to the taps; experts that are read at once are shown one by one."""
    changed = None
    for index in _indices(reading, factor):
        own = x if changed is None else changed
        part = own[index] if factor.index is None and index is not None else own
        names = [linear for linear, place, _ in reading[factor.parameter] if place.index == index]
        for tap in block.taps:
            replaced = tap.inputs(names, part)
            if replaced is None:
                continue
            part = replaced
            if factor.index is None and index is not None:
                changed = torch.stack([part if n == index else own[n] for n in range(len(own))])
            else:
                changed = part
    return changed


def _after(block: Block, reading: _Reading, factor: Factor, x: Tensor, y: Tensor) -> None:
    for index in _indices(reading, factor):
        apart = factor.index is None and index is not None
        own_x, own_y = (x[index], y[index]) if apart else (x, y)
        for linear, place, start in reading[factor.parameter]:
            if place.index == index:
                rows = slice(start, start + len(range(*place.rows)))
                for tap in block.taps:
                    tap.outputs(linear, rows, own_x, own_y[..., slice(*place.rows)])


def _indices(reading: _Reading, factor: Factor) -> list[int | None]:
    if factor.index is not None:
        return [factor.index] if any(place.index == factor.index for _, place, _ in reading[factor.parameter]) else []
    return list(dict.fromkeys(place.index for _, place, _ in reading[factor.parameter]))
