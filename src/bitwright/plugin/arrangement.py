"""Arrange a folder's tensors in a model: linears stay packed, experts become dense."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.errors import CheckpointError
from bitwright.formats.bitwright.config import Config
from bitwright.plugin.dense_loading import DensePlan, Source
from bitwright.plugin.destinations import Destination, Destinations
from bitwright.plugin.packed_model import check_headers, linears_of, pack_linears
from bitwright.plugin.stored import AGAIN, LEAVES, check_stored


@dataclass(frozen=True)
class Folder:
    """A folder, and the places of its tensors in a model.

    ``linears`` maps the model's packed linears to their names in the folder. ``dense`` maps the other packed weights to
    their destinations, or to None if the model has no place for them. ``plain`` maps the tensors that belong to no
    packed weight to their destinations.
    """

    checkpoint: Checkpoint
    destinations: Destinations
    plain: dict[str, Destination]
    linears: dict[str, str]
    dense: dict[str, Destination | None]


def look_into(checkpoint: Checkpoint, model: PreTrainedModel, config: Config, conversions: Iterable[Any]) -> Folder:
    """Find out which packed weights are linears of the model. Changes nothing."""
    destinations = Destinations(model, conversions)
    places = {*linears_of(model)} - {_module(destinations, name) for name in config.modules_to_not_convert}
    linears: dict[str, str] = {}
    dense: dict[str, Destination | None] = {}
    for name in (n.removesuffix(".weight_packed") for n in checkpoint.names if n.endswith(".weight_packed")):
        destination = destinations.of(f"{name}.weight") or destinations.of(name)
        module = "" if destination is None else destination.target.removesuffix(".weight")
        if module in places and _stays_whole(destinations, name):
            linears[module] = name
        else:
            dense[name] = destination
    every = ((name, destinations.of(name)) for name in checkpoint.names)
    plain = {name: destination for name, destination in every if destination is not None}
    return Folder(checkpoint, destinations, plain, linears, dense)


def arrange(folder: Folder, model: PreTrainedModel, config: Config) -> DensePlan:
    """Put empty packed linears in place, and plan what becomes dense.

    Raises CheckpointError for a folder that does not fit the model or its own config, or that would leave a parameter
    of the model without values.
    """
    dense = {target for place in folder.dense.values() if place is not None for target in place.targets}
    check_names(folder, model, config)
    kept = {_module(folder.destinations, name) for name in config.modules_to_not_convert}
    kept |= {target.removesuffix(".weight") for target in dense}
    names = {name: folder.linears.get(name, name) for name in linears_of(model) if name not in kept}
    check_headers(pack_linears(model, config, names), names, folder.checkpoint)
    for name in folder.dense:
        check_stored(folder.checkpoint, name, config)
    if config.activations is not None and dense:
        raise CheckpointError(
            f"the quantization_config quantizes activations, and {min(dense)} is dense once loaded, so that its inputs "
            "would not be; quantize the model again with A16"
        )
    plan = _plan(folder, model, config, dense)
    _check_complete(folder, model)
    return plan


def check_names(folder: Folder, model: nn.Module, config: Config) -> None:
    """Raise CheckpointError if the config names a module that neither model nor folder has."""
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    weights = {*linears_of(model)} | {*folder.linears.values(), *folder.dense}
    unknown = sorted(
        {name for name in config.exceptions if name not in weights}
        | {name for name in config.modules_to_not_convert if not _known(folder, linears, name)}
    )
    if unknown:
        raise CheckpointError(
            f"the quantization_config names {unknown[0]}, which is no linear of this model, nor in its folder; {AGAIN}"
        )


def _known(folder: Folder, linears: set[str], name: str) -> bool:
    module = _module(folder.destinations, name)
    return module in linears or f"{name}.weight" in folder.checkpoint or name in folder.checkpoint


def _module(destinations: Destinations, name: str) -> str:
    """The model's name for a module of the folder."""
    place = destinations.of(f"{name}.weight")
    return name if place is None or place.converter is not None else place.target.removesuffix(".weight")


def _stays_whole(destinations: Destinations, name: str) -> bool:
    """Whether transformers loads a packed weight's parts into the module of the weight, without a converter."""
    ends = [destinations.renamed(f"{name}.{leaf}").removesuffix(leaf) for leaf in LEAVES]
    whole = destinations.renamed(f"{name}.weight").removesuffix("weight")
    return {*ends} == {whole} and not any(destinations.converted(f"{name}.{leaf}") for leaf in ("weight", *LEAVES))


def _plan(folder: Folder, model: PreTrainedModel, config: Config, dense: set[str]) -> DensePlan:
    """The plan for the tensors of experts, and for unpacked tensors that go to the same parameters."""
    renamed, sources, destinations = {}, {}, {}
    for weight, tensor, destination, packed in _dense_tensors(folder, dense):
        renamed[folder.destinations.renamed(tensor)] = destination.target
        sources[tensor] = Source(weight, packed, folder.checkpoint.entry(tensor).shape)
        destinations[weight] = destination
    places = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items() if name in dense}
    return DensePlan(config, renamed, sources, destinations, places)


def _dense_tensors(folder: Folder, dense: set[str]) -> Iterator[tuple[str, str, Destination, bool]]:
    """The tensors of dense parameters: (weight, tensor, destination, whether a part of a packed weight)."""
    for weight, place in folder.dense.items():
        tensors = (f"{weight}.{leaf}" for leaf in LEAVES if place is not None)
        yield from ((weight, t, place, True) for t in tensors if place is not None and t in folder.checkpoint)
    yield from ((name, name, place, False) for name, place in folder.plain.items() if place.target in dense)


def _check_complete(folder: Folder, model: PreTrainedModel) -> None:
    """Raise CheckpointError if a parameter would get no values: transformers would initialize it at random."""
    if not folder.destinations.certain:
        return
    places = [*folder.plain.values(), *(place for place in folder.dense.values() if place is not None)]
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    reached = {target for place in places for target in place.targets} | {*tied, *tied.values()}
    patterns = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    for name, _ in model.named_parameters():
        if name not in reached and not any(pattern.search(name) for pattern in patterns):
            raise CheckpointError(f"{folder.checkpoint.folder} has no weights for {name}; {AGAIN}")
