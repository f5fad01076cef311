"""Walk through a model block by block, with the model's own code between the blocks.

Each segment of tokens runs through the forward pass that transformers wrote, in a coroutine that stops at every block:
the block's call is handed out, and the pass goes on with whatever the block is said to return. So what a model does
before, between and after its blocks need not be known here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from jaxtyping import Int
from torch import Tensor, nn

from bitwright.model.calls import Call


class _Segment(greenlet):
    """The forward pass of one segment; it switches to its parent with a name and a call at each stop."""


class Stops:
    """Modules at which a walk stops, by name. Outside of a walk they run as ever."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        for name, module in modules.items():
            module.forward = _stopping(name, module.forward)


def _stopping(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    def stop_or_run(*args: Any, **kwargs: Any) -> Any:
        segment = getcurrent()
        if not isinstance(segment, _Segment):
            return forward(*args, **kwargs)
        assert segment.parent is not None
        return segment.parent.switch((name, Call(args, kwargs)))

    return stop_or_run


class Walk:
    """Segments on their way through a model, all in front of the same block.

    ``name`` is the module that they stop at, None at the end; ``calls`` are its calls, one for each segment.
    """

    def __init__(self, model: nn.Module, tokens: Int[Tensor, "N T"]) -> None:
        """Go to the first stop; tokens are on the CPU, as is everything of the model outside of its stops."""
        self.name: str | None = None
        self.calls: list[Call] = []
        self._equal: dict[int, tuple[Tensor, Tensor]] = {}
        self._segments = [_Segment(lambda ids=ids: model(input_ids=ids[None], use_cache=False)) for ids in tokens]
        self._stops: dict[int, tuple[str, Call] | None] = {}
        for row in range(len(tokens)):
            self._stops[row] = self._switch(row)
        self.turn()

    def advance(self, results: Sequence[Any]) -> None:
        """Let the block return these results, one for each segment, and go to the next stop."""
        for row, result in enumerate(results):
            self.send(row, result)
        self.turn()

    def send(self, row: int, result: Any) -> None:
        """Let the block return this result for one segment; its call is gone then."""
        self.calls[row] = Call((), {})
        self._stops[row] = self._switch(row, result)

    def turn(self) -> None:
        """Turn to the next stop, once every segment has been sent there."""
        stops = [self._stops.pop(row) for row in range(len(self._segments))]
        first = stops[0]
        if first is None:
            self.name, self.calls = None, []
            return
        self.name, whole = first
        assert all(stop is not None and stop[0] == self.name for stop in stops), "segments of one length go one way"
        self.calls = [whole, *(self._sharing(stop[1], whole) for stop in stops[1:] if stop is not None)]

    def close(self) -> None:
        """End the passes where they are."""
        for segment in self._segments:
            if not segment.dead:
                segment.throw(GreenletExit)
        self._segments, self.calls = [], []

    def _switch(self, row: int, *value: Any) -> tuple[str, Call] | None:
        """Let one segment go on to its next stop; None at the end of its pass."""
        segment, grad = self._segments[row], torch.is_grad_enabled()
        try:
            with torch.no_grad():
                stop: tuple[str, Call] = segment.switch(*value)
        finally:
            torch.set_grad_enabled(grad)
        return None if segment.dead else stop

    def _sharing(self, call: Call, first: Call) -> Call:
        """A call that has the tensors of another one wherever they are equal, so that they need not be compared again.

        Dictionaries stay the segment's own.
        """
        args = tuple(self._shared(*pair) for pair in zip(call.args, first.args, strict=True))
        return Call(args, {key: self._shared(value, first.kwargs[key]) for key, value in call.kwargs.items()})

    def _shared(self, value: Any, first: Any) -> Any:
        if type(value) is tuple:
            return tuple(self._shared(*pair) for pair in zip(value, first, strict=True))
        if not isinstance(value, Tensor) or not isinstance(first, Tensor) or value.shape != first.shape:
            return value
        known = self._equal.get(id(value))
        if known is None or known[0] is not value or known[1] is not first:
            if not torch.equal(value, first):
                return value
            self._equal[id(value)] = (value, first)
        return first
