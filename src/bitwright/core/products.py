"""Notice every product of a module's inputs with one of its parameters, whatever classes the module is made of.

Linears differ in how they are stored: ``nn.Linear`` [O, I], GPT-2's ``Conv1D`` [I, O], experts [E, O, I] or [E, I, O]
in one parameter, several linears above each other in one. They have in common that some rows of a parameter are handed
to a matrix product of torch. That is what is noticed here.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

LINEAR = frozenset({torch.nn.functional.linear})
MATMUL = frozenset(
    {
        *(torch.matmul, torch.mm, torch.bmm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.bmm),
        torch.Tensor.__matmul__,
    }
)
"""Products (x, W), in which W is [I, O] or [E, I, O]."""
CASTS = frozenset(
    {
        *(torch.Tensor.to, torch.Tensor.type, torch.Tensor.float, torch.Tensor.double, torch.Tensor.half),
        *(torch.Tensor.bfloat16, torch.Tensor.type_as, torch.Tensor.contiguous),
    }
)
ADDED = frozenset({torch.addmm, torch.baddbmm, torch.Tensor.addmm, torch.Tensor.baddbmm})
"""Products (b, x, W)."""


@dataclass(frozen=True)
class Factor:
    """The part of a parameter that a product reads.

    ``index`` is the expert in a parameter [E, ., .]; None if the parameter is a matrix, or if all experts are read at
    once. ``rows`` are the rows [start, stop) of the matrix as it multiplies, [O, I]; ``transposed`` says that it is
    stored [I, O].
    """

    parameter: str
    index: int | None
    rows: tuple[int, int]
    transposed: bool


Notice = Callable[[Factor, Tensor], Tensor | None]
"""A function that is called with what a product reads and its inputs [..., I]; it may return others in their place."""
Result = Callable[[Factor, Tensor, Tensor], None]
"""A function that is called with the inputs of a product, and its result without a bias."""


class Products(TorchFunctionMode):
    """A context in which products with these parameters are noticed.

    ``other`` is called with the name of a parameter that is read in another way; a view of it is none.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        before: Notice | None = None,
        after: Result | None = None,
        other: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__()
        self.parameters = {_storage(tensor): (name, tensor) for name, tensor in parameters.items()}
        self.before, self.after, self.other = before, after, other

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch; notice it if it is a product with one of the parameters."""
        kwargs = kwargs or {}
        place = 0 if func in LINEAR or func in MATMUL else 1 if func in ADDED else None
        if place is not None and len(args) > place + 1:
            factor = self._factor(args[place + 1], func in LINEAR)
            if factor is not None:
                return self._product(func, place, factor, args, kwargs)
        result = func(*args, **kwargs)
        if func in CASTS and isinstance(result, Tensor) and self._follow(args[0], result):
            return result
        if self.other is not None:
            self._look_for_others(func, args, kwargs, result)
        return result

    def _product(self, func: Any, place: int, factor: Factor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        replaced = None if self.before is None else self.before(factor, args[place])
        if replaced is not None:
            args = (*args[:place], replaced, *args[place + 1 :])
        result = func(*args, **kwargs)
        if self.after is not None:
            bias = kwargs.get("bias", args[2] if len(args) > 2 else None) if func in LINEAR else None
            bias = args[0] if func in ADDED else bias
            self.after(factor, args[place], result if bias is None else result - bias)
        return result

    def _follow(self, cast: Tensor, result: Tensor) -> bool:
        """Follow a parameter into a copy of another dtype: routers multiply by one in float32."""
        name, parameter = self.parameters.get(_storage(cast), ("", None))
        whole = parameter is not None and cast.shape == parameter.shape == result.shape
        if whole and cast.stride() == result.stride():
            self.parameters[_storage(result)] = (name, result)
            return True
        return False

    def _factor(self, weight: Any, linear: bool) -> Factor | None:
        if not isinstance(weight, Tensor) or weight.dim() not in (2, 3):
            return None
        name, parameter = self.parameters.get(_storage(weight), ("", None))
        return None if parameter is None else factor_of(name, parameter, weight if linear else weight.mT)

    def _look_for_others(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        read = {s for t in _tensors((args, tuple(kwargs.values()))) if (s := _storage(t)) in self.parameters}
        results = [_storage(tensor) for tensor in _tensors((result,))]
        if results and not read.issuperset(results) and self.other is not None:
            for storage in read:
                self.other(self.parameters[storage][0])


def factor_of(name: str, parameter: Tensor, weight: Tensor) -> Factor | None:
    """Find which part of a parameter a view [O, I] or [E, O, I] of it is; None if it is no whole rows."""
    offset, index = int(weight.storage_offset()) - int(parameter.storage_offset()), None
    if parameter.dim() == 3:
        index, offset = divmod(offset, int(parameter.stride(0)))
        if weight.dim() == 3:
            if weight.shape[0] != parameter.shape[0]:
                return None
            index = None
    elif parameter.dim() != 2 or weight.dim() != 2:
        return None
    rows, columns = parameter.shape[-2:]
    strides = (int(parameter.stride(-2)), int(parameter.stride(-1)))
    for transposed in (False, True):
        high, wide = (columns, rows) if transposed else (rows, columns)
        along, across = reversed(strides) if transposed else strides
        start, rest = divmod(offset, along) if along else (0, offset)
        fits = weight.shape[-1] == wide and start + weight.shape[-2] <= high and rest == 0
        if (
            fits
            and (weight.stride(-2) == along or weight.shape[-2] == 1)
            and (weight.stride(-1) == across or wide == 1)
        ):
            return Factor(name, index, (start, start + weight.shape[-2]), transposed)
    return None


def _storage(tensor: Tensor) -> int:
    pointer: int = tensor.untyped_storage()._cdata
    return pointer


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())
