"""Route every token to every expert while statistics are measured."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from bitwright.core.block import Block
from bitwright.core.errors import RecipeError


@contextmanager
def every_expert(block: Block, wanted: bool) -> Iterator[None]:
    """A context in which the block's routers choose all experts, if that is ``wanted``.

    What experts read does not depend on how many are chosen. Raises RecipeError for a router that cannot.
    """
    counts = Counter(group.stage for group in block.topology.groups if group.routed)
    if not wanted or not counts:
        yield
        return
    try:
        with _ChoosingAll(set(counts.values())):
            yield
    except (RuntimeError, IndexError) as error:
        why = str(error).splitlines()[0]
        raise RecipeError(
            f"{block.name}: its router cannot choose all experts ({why}); leave --all-experts out"
        ) from error


class _ChoosingAll(TorchFunctionMode):
    """A context in which torch.topk over as many values as there are experts returns all of them."""

    def __init__(self, experts: set[int]) -> None:
        super().__init__()
        self.experts = experts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch; let topk among experts return every one."""
        kwargs = dict(kwargs or {})
        if func in (torch.topk, torch.Tensor.topk) and args[0].shape[-1] in self.experts:
            every, kept = args[0].shape[-1], args[2:]
            kwargs.pop("k", None)
            return func(args[0], every, *kept, **kwargs)
        return func(*args, **kwargs)
