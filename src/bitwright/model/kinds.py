"""Blocks of one kind, which differ in nothing but their weights: one of each is recorded."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from bitwright.core.weight import starred
from bitwright.model.calls import Call, UnlikeCallsError, hand_back, hidden_of, joined, split
from bitwright.model.class_code import weights_taken
from bitwright.model.recording import Recording, record

CLOSE = 1e-4
"""The relative difference of results that are the same but for rounding."""


@dataclass(frozen=True)
class Kind:
    """What was recorded of the first block of a kind; ``result`` is what it returned."""

    module: nn.Module
    recording: Recording
    call: Call
    result: Any
    joins: bool
    _taken: dict[str, frozenset[tuple[str, str]]] = field(default_factory=dict)

    @cached_property
    def orientations(self) -> dict[str, set[bool]]:
        """Whether products read each parameter transposed; also by names without numbers, for unreached experts."""
        used: dict[str, set[bool]] = {}
        for product in self.recording.products:
            factor = product.factor
            for name in (factor.parameter, starred(f"{factor.parameter}.")):
                used.setdefault(name, set()).add(factor.transposed)
        return used

    def orientation(self, parameter: str) -> set[bool] | None:
        """The ways in which products read a parameter; None if none does."""
        return self.orientations.get(parameter) or self.orientations.get(starred(f"{parameter}."))

    def taken_from(self, parameter: str) -> str | None:
        """The class whose code takes the weight of a linear, as kernels do that are not run here; None if none does."""
        *path, leaf, end = ("", *parameter.split("."))
        owner = ".".join(path).strip(".")
        if owner not in self._taken:
            self._taken[owner] = weights_taken(self.module.get_submodule(owner))
        return type(self.module.get_submodule(owner)).__name__ if (leaf, end) in self._taken[owner] else None


def signature_of(module: nn.Module) -> object:
    """What makes two blocks of one kind: classes, parameters, and settings, but for their number."""
    parts = []
    for name, part in module.named_modules():
        shapes = tuple((key, tuple(p.shape)) for key, p in part.named_parameters(recurse=False))
        plain = (bool, int, float, str, type(None))
        settings = {key: value for key, value in vars(part).items() if isinstance(value, plain) and key[0] != "_"}
        chosen = tuple(sorted((k, v) for k, v in settings.items() if k not in ("layer_idx", "layer_id", "block_idx")))
        parts.append((name, type(part), shapes, repr(chosen)))
    return tuple(parts)


def recorded(module: nn.Module, calls: Sequence[Call]) -> Kind:
    """Record the first block of a kind, on all segments if their calls can be joined."""
    own = {name: p.detach() for name, p in module.named_parameters()}
    results = [module(*call.args, **call.kwargs) for call in map(_alone, calls)]
    single = [hidden_of(result) for result in results]
    try:
        together = joined(calls)
        whole = split(module(*together.args, **dict(together.kwargs)), calls)
        joins = all(_close(hidden_of(a), b) for a, b in zip(whole, single, strict=True))
    except (UnlikeCallsError, RuntimeError, IndexError, ValueError):
        joins = False
    call = joined(calls if joins else calls[:1])
    return Kind(module, record(module, call, own), call, results[0], joins)


def _alone(call: Call) -> Call:
    return joined([call])


def run_block(module: nn.Module, call: Call) -> Any:
    """What a block returns; what it adds to a dictionary is handed back."""
    own = _alone(call)
    result = module(*own.args, **own.kwargs)
    hand_back(own, [call])
    return result


def _close(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and bool((left - right).abs().max() <= CLOSE * right.abs().max())
