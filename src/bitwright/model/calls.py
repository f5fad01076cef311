"""The calls of a block as the model makes them: hidden states, and whatever else transformers hands over.

A call is recorded for each segment of tokens. Several are joined into one for a batch: values that are equal in all of
them stay as they are (masks, rotary positions), others are put behind each other along the batch. What a block adds to
a dictionary (keys and values that later blocks share) goes back into the dictionary of each segment.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HIDDEN = "hidden_states"


@dataclass(frozen=True)
class Call:
    """The arguments of a block for some segments; the first, or ``hidden_states``, are the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def hidden(self) -> Tensor:
        """The hidden states, [1, T, D] for one segment; some architectures have further dimensions."""
        hidden: Tensor = self.args[0] if self.args else self.kwargs[HIDDEN]
        return hidden

    @property
    def batch_dim(self) -> int:
        """The dimension of the batch in the hidden states of one segment."""
        return batch_dim(self.hidden)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Call":
        """The call with every tensor changed."""
        return Call(mapped(self.args, change), mapped(dict(self.kwargs), change))

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "Call":
        """The call on a device, its floating tensors in a dtype."""
        return self.map(lambda t: t.to(device, dtype if dtype is not None and t.is_floating_point() else t.dtype))


class UnlikeCallsError(Exception):
    """The refusal to join calls: values differ that have no dimension for a batch."""


def joined(calls: Sequence[Call]) -> Call:
    """Join the calls of segments into one of their batch. Raises UnlikeCallsError."""
    if len(calls) == 1:
        return Call(_copied(calls[0].args), _copied(dict(calls[0].kwargs)))
    return Call(_joined([call.args for call in calls]), _joined([dict(call.kwargs) for call in calls]))


def split(result: Any, calls: Sequence[Call]) -> list[Any]:
    """Split a block's result for a batch into those of its segments."""
    count, dim = len(calls), calls[0].batch_dim
    like = calls[0].hidden.shape

    def part(value: Tensor, n: int) -> Tensor:
        along = dim if value.dim() == len(like) and value.shape[dim] == count else _first(value.shape, count)
        return value if along is None or count == 1 else value.narrow(along, n, 1)

    return [mapped(result, lambda value, n=n: part(value, n)) for n in range(count)]  # type: ignore[misc]


def hand_back(joined_call: Call, calls: Sequence[Call]) -> None:
    """Put what a block added to a dictionary into the dictionary of each segment."""
    before, after = (list(_dictionaries((call.args, dict(call.kwargs)))) for call in (calls[0], joined_call))
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        for key in new.keys() - old.keys():
            for segment, value in enumerate(split(new[key], calls)):
                own = list(_dictionaries((calls[segment].args, dict(calls[segment].kwargs))))[number]
                own[key] = mapped(value, lambda tensor: tensor.detach().cpu().clone())


def hidden_of(result: Any) -> Tensor:
    """The hidden states in what a block returns."""
    while not isinstance(result, Tensor):
        result = next(iter(result.values())) if isinstance(result, Mapping) else result[0]
    return result


def with_hidden(result: Any, hidden: Tensor) -> Any:
    """What a block returned, with other hidden states."""
    if isinstance(result, Tensor):
        return hidden
    if isinstance(result, MutableMapping):
        first = next(iter(result))
        changed = type(result)()
        for key, value in result.items():
            changed[key] = with_hidden(value, hidden) if key == first else value
        return changed
    return type(result)((with_hidden(result[0], hidden), *result[1:]))


def batch_dim(value: Tensor) -> int:
    """The dimension of the batch in a value of one segment: the first of size 1."""
    dim = _first(value.shape, 1)
    return 0 if dim is None else dim


def _first(shape: Sequence[int], size: int) -> int | None:
    return next((dim for dim, length in enumerate(shape) if length == size), None)


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change every tensor in a value, such as a tuple or a dictionary; dictionaries are copied."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, MutableMapping):
        changed = type(value)()
        for key, item in value.items():
            changed[key] = mapped(item, change)
        return changed
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(item, change) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(mapped(item, change) for item in value)
    return value


def _copied(value: Any) -> Any:
    return mapped(value, lambda tensor: tensor)


def _joined(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        if all(value is first or (value.shape == first.shape and torch.equal(value, first)) for value in values):
            return first
        dim = _first(first.shape, 1)
        if dim is None or any(value.shape != first.shape for value in values):
            raise UnlikeCallsError
        return torch.cat(list(values), dim)
    if isinstance(first, MutableMapping):
        together = type(first)()
        for key in first:
            together[key] = _joined([value[key] for value in values])
        return together
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(*map(_joined, zip(*values, strict=True)))
    if isinstance(first, list | tuple):
        return type(first)(map(_joined, zip(*values, strict=True)))
    return first


def _dictionaries(value: Any) -> Iterator[MutableMapping[Any, Any]]:
    """The dictionaries among arguments, but for the outermost one."""
    args, kwargs = value
    for item in (*args, *kwargs.values()):
        if isinstance(item, MutableMapping):
            yield item
