"""The two streams of activations: through the full-precision blocks, and through the quantized ones."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bitwright.core.block import Block
from bitwright.core.method import LinearStats
from bitwright.core.scheme import Scheme
from bitwright.steps.activations import quantized_activations
from bitwright.steps.apply import Folded
from bitwright.stream.forward import forward_all, forward_batches
from bitwright.stream.skeleton import Recorder, Skeleton


@dataclass(frozen=True)
class Activations:
    """A block's inputs on the full-precision stream and on the quantized stream."""

    reference: Float[Tensor, "N T D"]
    quantized: Float[Tensor, "N T D"]


@dataclass(frozen=True)
class Stream:
    """The inputs of the next block, and each block's keyword arguments (masks, rotary positions)."""

    activations: Activations
    kwargs: list[dict[str, Any]]

    @property
    def shared(self) -> bool:
        """Whether both streams are one tensor, as they are in front of the first block."""
        return self.activations.reference is self.activations.quantized

    def kwargs_of(self, block: Block) -> dict[str, Any]:
        """The block's arguments besides the hidden states; none for the output layer."""
        return self.kwargs[block.index] if block.index < len(self.kwargs) else {}


@dataclass(frozen=True)
class StreamErrors:
    """The relative squared errors of each linear's output on the reference inputs, and of the block's output."""

    linears: Mapping[str, float]
    block: float


@torch.no_grad()
def enter(skeleton: Skeleton, tokens: Int[Tensor, "N T"]) -> Stream:
    """Compute the inputs of the first block.

    The model's own forward pass runs with recorders in the place of blocks, so that transformers' own code computes
    everything before them. It runs one sequence at a time, so masks and positions broadcast over a batch.
    """
    decoder_name, _, leaf = skeleton.family.blocks.rpartition(".")
    decoder = skeleton.model.get_submodule(decoder_name)
    blocks = decoder.get_submodule(leaf)
    recorders = [Recorder(block) for block in blocks.children()]
    setattr(decoder, leaf, nn.ModuleList(recorders))
    try:
        inputs = torch.empty(0)
        with skeleton.materialised(decoder_name):
            for n, ids in enumerate(tokens):
                decoder(input_ids=ids[None].to(skeleton.device), use_cache=False)
                hidden = recorders[0].hidden
                assert hidden is not None
                if n == 0:  # filled in place: joining at the end would need all segments twice
                    inputs = torch.empty((len(tokens), *hidden.shape[1:]), dtype=hidden.dtype)
                inputs[n] = hidden[0]
    finally:
        setattr(decoder, leaf, blocks)
    return Stream(Activations(inputs, inputs), [r.kwargs for r in recorders])


def statistics(block: Block, stream: Stream) -> tuple[dict[str, LinearStats], Tensor]:
    """Statistics of every linear's input on the full-precision stream, and the block's full-precision outputs."""
    sums: dict[str, _Sums] = {group.linears[0]: _Sums() for group in block.topology.groups}
    hooks = [block.linear(name).register_forward_pre_hook(running.add) for name, running in sums.items()]
    try:
        outputs = forward_all(block, {}, stream.activations.reference, stream.kwargs_of(block))
    finally:
        for hook in hooks:
            hook.remove()
    inputs = {name: sums[group.linears[0]].result() for group in block.topology.groups for name in group.linears}
    return inputs, outputs


class _Sums:
    """Running statistics of a linear's input."""

    def __init__(self) -> None:
        self.tokens = 0
        self.least = self.most = self.magnitude = torch.zeros(())

    def add(self, _: nn.Module, args: tuple[Tensor]) -> None:
        """Add one batch; this is a forward pre-hook."""
        x = args[0].detach().flatten(0, -2).float()
        low, high = x.aminmax(dim=0)
        self.least = torch.minimum(low, self.least) if self.tokens else low
        self.most = torch.maximum(high, self.most) if self.tokens else high
        self.magnitude = self.magnitude + x.abs().sum(dim=0, dtype=torch.float64)
        self.tokens += len(x)

    def result(self) -> LinearStats:
        """The statistics of all batches."""
        return LinearStats(self.tokens, self.least, self.most, (self.magnitude / self.tokens).float())


def advance(
    block: Block,
    folded: Folded,
    written: Mapping[str, Tensor],
    scheme: Scheme,
    stream: Stream,
    *,
    in_place: bool = False,
) -> tuple[Stream, StreamErrors]:
    """Advance both streams by a block; return them, and the errors of its quantized weights (and activations).

    ``in_place`` writes the new streams into the memory of the old ones.
    """
    kwargs, before = stream.kwargs_of(block), stream.activations
    passes = partial(forward_all, block, kwargs=kwargs, in_place=in_place and not stream.shared)
    reference = before.reference
    with _measured(block, folded, written) as sums:
        if folded.transformed:
            deque(forward_batches(block, folded.full, reference, kwargs), maxlen=0)  # only the errors are needed
        else:
            reference = passes(folded.full, reference)
    if folded.transformed:  # from the original's weights, so that a continued run sees the same stream
        reference = passes({}, reference)
    with quantized_activations(block, scheme):
        outputs = passes(written, before.quantized)
    linears = {name: _ratio(error, signal) for name, (error, signal) in sums.items()}
    errors = StreamErrors(linears, _relative_error(outputs, reference))
    return Stream(Activations(reference, outputs), stream.kwargs), errors


def replay(
    block: Block, written: Mapping[str, Tensor], scheme: Scheme, stream: Stream, *, in_place: bool = False
) -> Stream:
    """Advance both streams by a block that an earlier run finished; ``in_place`` is that of ``advance``."""
    kwargs, before = stream.kwargs_of(block), stream.activations
    passes = partial(forward_all, block, kwargs=kwargs, in_place=in_place and not stream.shared)
    reference = passes({}, before.reference)
    with quantized_activations(block, scheme):
        outputs = passes(written, before.quantized)
    return Stream(Activations(reference, outputs), stream.kwargs)


@contextmanager
def _measured(block: Block, folded: Folded, written: Mapping[str, Tensor]) -> Iterator[dict[str, tuple[float, float]]]:
    """A context in which every linear sums the squares of its output's error and of its output, without biases."""
    sums = dict.fromkeys(folded.linears, (0.0, 0.0))
    differences = {}
    for name in folded.linears:
        full = folded.full[f"{name}.weight"]
        differences[name] = written[f"{name}.weight"].to(full) - full

    def adder(name: str) -> Callable[[nn.Linear, tuple[Tensor], Tensor], None]:
        def add(module: nn.Linear, args: tuple[Tensor], y: Tensor) -> None:
            error, signal = sums[name]
            bias: Tensor | None = module.bias
            product = y if bias is None else y - bias
            off = nn.functional.linear(args[0], differences[name].to(args[0].dtype))
            sums[name] = error + _squares(off), signal + _squares(product)

        return add

    hooks = [block.linear(name).register_forward_hook(adder(name)) for name in folded.linears]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


def _relative_error(outputs: Tensor, reference: Tensor) -> float:
    """The relative squared error, summed over segments to save memory."""
    error = sum(_squares(o - r) for o, r in zip(outputs, reference, strict=True))
    return _ratio(error, sum(_squares(r) for r in reference))


def _squares(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values.float()).double() ** 2)


def _ratio(error: float, signal: float) -> float:
    return error / signal if signal > 0 else 0.0 if error == 0 else float("inf")
