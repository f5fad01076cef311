"""Load experts: collect their packed tensors, dequantize them, and hand them to transformers' own converter.

Tensors are collected by their own names. Transformers collects by pattern: it makes a list over the experts for each
ending of a name. If an expert has no outliers, these lists do not align.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter

from bitwright.core.errors import CheckpointError
from bitwright.formats.bitwright.config import Config
from bitwright.plugin.destinations import Destination
from bitwright.plugin.stored import AGAIN, dequantized

PATTERN = "bitwright: packed"


@dataclass(frozen=True)
class Source:
    """A tensor of the folder: its weight, whether it is a part of a packed weight, and its shape on disk."""

    weight: str
    packed: bool
    shape: tuple[int, ...]


@dataclass(frozen=True)
class DensePlan:
    """The plan by which tensors of the folder become dense parameters of the model.

    ``renamed`` maps a tensor's name, as converters see it, to its first parameter. The keys of ``sources`` are names of
    tensors in the folder, those of ``destinations`` are names of weights. ``places`` has shape and dtype of the model's
    tensors. ``done`` grows as parameters are made.
    """

    config: Config
    renamed: Mapping[str, str]
    sources: Mapping[str, Source]
    destinations: Mapping[str, Destination]
    places: Mapping[str, tuple[torch.Size, torch.dtype]]
    done: set[str] = field(default_factory=set)

    @property
    def missing(self) -> list[str]:
        """Parameters that have not been made."""
        return sorted({target for d in self.destinations.values() for target in d.targets} - self.done)


class FromPacked(WeightConverter):
    """A converter that makes every parameter of a plan; transformers copies it for each of them."""

    def __init__(self, plan: DensePlan) -> None:
        """Match the tensors that the plan names, and no others."""
        super().__init__([PATTERN], [PATTERN], [_Dequantizing()])
        self.plan = plan

    @property
    def makes(self) -> frozenset[str]:
        """The parameters that are made, for those who ask what a folder fills before it is loaded."""
        return frozenset(target for place in self.plan.destinations.values() for target in place.targets)

    def __deepcopy__(self, memo: Any) -> "FromPacked":
        return FromPacked(self.plan)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The parameter that a tensor goes to."""
        target = self.plan.renamed.get(source_key)
        return (source_key, None) if target is None else (target, PATTERN)

    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
        """Collect a tensor under its own name."""
        self.collected_tensors[source_key].append(future)
        self.layer_targets[target_key].add(source_key)

    def convert(self, layer_name: str, model: Any = None, config: Any = None, *_: Any, **__: Any) -> dict[str, Tensor]:
        """The dense parameters, by their names in the model. Raises CheckpointError if the tensors do not fit."""
        plan = self.plan
        collected = {name: tensors[0] for name, tensors in self.materialize_tensors().items()}
        dense = self._dense(collected, plan.places[layer_name][1])
        try:
            parameters = _converted(dense, plan.destinations, layer_name, model, config)
        except Exception as error:  # an operation may raise anything, for instance for experts that differ in shape
            raise CheckpointError(f"the weights of {layer_name} do not go together: {error}; {AGAIN}") from error
        for name, tensor in parameters.items():
            if name in plan.places and tensor.shape != plan.places[name][0]:
                raise CheckpointError(
                    f"the weights of {name} make {list(tensor.shape)}, and the model has {list(plan.places[name][0])}; "
                    f"{AGAIN}"
                )
        plan.done.update(parameters)
        return parameters

    def _dense(self, collected: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """Dequantize each weight by itself; return the weights by name, in the order of their first tensors."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in collected.items():
            source = self.plan.sources[name]
            if tuple(tensor.shape) != source.shape:
                raise CheckpointError(
                    f"{name} is {list(source.shape)} on disk and came as {list(tensor.shape)}: packed experts cannot "
                    "be cut for parallel loading; load the model without tensor or expert parallelism"
                )
            parts.setdefault(source.weight, {})[name] = tensor
        collected.clear()
        return {weight: self._weight(weight, parts.pop(weight), dtype) for weight in list(parts)}

    def _weight(self, weight: str, tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        if not self.plan.sources[next(iter(tensors))].packed:
            return next(iter(tensors.values())).to(dtype)
        return dequantized(tensors, weight, self.plan.config).to(dtype)


def _converted(
    dense: dict[str, Tensor], destinations: Mapping[str, Destination], layer_name: str, model: Any, config: Any
) -> dict[str, Tensor]:
    """Convert dense weights with the model's own converter."""
    first = destinations[next(iter(dense))]
    if first.converter is None:
        (only,) = dense.values()
        return {first.target: only}
    converter = deepcopy(first.converter)
    add: Any = (
        converter.add_tensor
    )  # it takes tensors as well as futures, because transformers also saves models with it
    for weight in list(dense):
        add(layer_name, weight, destinations[weight].pattern, dense.pop(weight))
    parameters = converter.convert(layer_name, model=model, config=config)
    return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in parameters.items()}


class _Dequantizing(ConversionOps):
    """A placeholder operation; ``FromPacked`` does the work.

    If there is a quantizer, transformers loads tensors in the dtype that they have on disk.
    """

    hf_quantizer = True

    def convert(self, input_dict: Any, *_: Any, **__: Any) -> Any:
        return input_dict
