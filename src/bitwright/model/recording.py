"""What happens inside a block: the products that it computes, in their order, and the modules around them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bitwright.core.products import Factor, Products
from bitwright.model.calls import Call, hidden_of


@dataclass(frozen=True)
class Product:
    """A product that a block computes: what it reads, its inputs [..., I], and the modules around it, innermost last.

    Each module stands with whether its own first argument is this product's input.
    """

    factor: Factor
    inputs: Tensor
    modules: tuple[tuple[str, bool], ...]


@dataclass
class Recording:
    """One call of a block: its output, products, and parameters that are read in other ways than by products."""

    output: Tensor
    products: list[Product] = field(default_factory=list)
    others: set[str] = field(default_factory=set)


@torch.no_grad()
def record(module: nn.Module, call: Call, parameters: Mapping[str, Tensor]) -> Recording:
    """Run a block's module with these parameters, all that it has, and record what happens."""
    recording, around = Recording(torch.empty(0)), list[tuple[str, int]]()

    def before(factor: Factor, inputs: Tensor) -> None:
        modules = tuple((name, key == _key(inputs)) for name, key in around)
        recording.products.append(Product(factor, inputs, modules))

    with _entering(module, around), Products(parameters, before, other=recording.others.add):
        result = functional_call(module, dict(parameters), call.args, dict(call.kwargs))
    recording.output = hidden_of(result)
    return recording


@contextmanager
def _entering(module: nn.Module, around: list[tuple[str, int]]) -> Iterator[None]:
    """A context in which ``around`` lists the modules that are running, each with a key of its first argument."""
    hooks = []

    def enter(name: str, first: str | None) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = args[0] if args else kwargs.get(first or "")
            around.append((name, _key(value) if isinstance(value, Tensor) else 0))

        return hook

    def leave(*_: object) -> None:
        around.pop()

    for name, part in module.named_modules():
        first = next(iter(signature(part.forward).parameters), None)
        hooks.append(part.register_forward_pre_hook(enter(name, first), with_kwargs=True))
        hooks.append(part.register_forward_hook(leave))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _key(tensor: Tensor) -> int:
    """A key of a tensor's memory: the same for its views, as long as it lives."""
    return int(tensor.untyped_storage().data_ptr()) + int(tensor.storage_offset())
