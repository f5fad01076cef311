"""What becomes of every tensor of a folder: linears of the model stay packed, experts are dense once loaded."""

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
    """A folder beside the model that it is loaded into.

    ``linears`` are the names of its packed linears, by their names in the model. ``dense`` are the other packed weights
    and where they go, None where the model has no place for them. ``plain`` are the tensors that are parts of neither
    and have a place.
    """

    checkpoint: Checkpoint
    destinations: Destinations
    plain: dict[str, Destination]
    linears: dict[str, str]
    dense: dict[str, Destination | None]


def look_into(checkpoint: Checkpoint, model: PreTrainedModel, config: Config, conversions: Iterable[Any]) -> Folder:
    """Finds out which packed weights are linears of the model. Changes nothing."""
    destinations = Destinations(model, conversions)
    places = {*linears_of(model)} - {_module(destinations, name) for name in config.modules_to_not_convert}
    linears: dict[str, str] = {}
    dense: dict[str, Destination | None] = {}
    for name in (n.removesuffix(".weight_packed") for n in checkpoint.names if n.endswith(".weight_packed")):
        found = destinations.of(f"{name}.weight") or destinations.of(name)
        module = "" if found is None else found.target.removesuffix(".weight")
        if module in places and _stays_whole(destinations, name):
            linears[module] = name
        else:
            dense[name] = found
    every = ((name, destinations.of(name)) for name in checkpoint.names)
    plain = {name: found for name, found in every if found is not None}
    return Folder(checkpoint, destinations, plain, linears, dense)


def arrange(folder: Folder, model: PreTrainedModel, config: Config) -> DensePlan:
    """Puts packed linears in place, and plans what is made dense. Raises CheckpointError for a folder that does not
    fit the model or its own config, and where a parameter of the model would be left without values."""
    made = {target for found in folder.dense.values() if found is not None for target in found.targets}
    check_names(folder, model, config)
    kept = {_module(folder.destinations, name) for name in config.modules_to_not_convert}
    kept |= {target.removesuffix(".weight") for target in made}
    names = {name: folder.linears.get(name, name) for name in linears_of(model) if name not in kept}
    check_headers(pack_linears(model, config, names), names, folder.checkpoint)
    for name in folder.dense:
        check_stored(folder.checkpoint, name, config)
    if config.activations is not None and made:
        raise CheckpointError(
            f"the quantization_config quantizes activations, and {min(made)} is dense once loaded, so that its inputs "
            "would not be; quantize the model again with A16"
        )
    plan = _plan(folder, model, config, made)
    _check_complete(folder, model)
    return plan


def check_names(folder: Folder, model: nn.Module, config: Config) -> None:
    """Refuses a config that names what neither model nor folder has. CheckpointError."""
    linears = {*linears_of(model)}
    weights = linears | {*folder.linears.values(), *folder.dense}
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
    """The model's name for what the folder calls so."""
    found = destinations.of(f"{name}.weight")
    return name if found is None or found.converter is not None else found.target.removesuffix(".weight")


def _stays_whole(destinations: Destinations, name: str) -> bool:
    """Whether transformers takes the parts of a packed weight to where it takes the weight, no converter between."""
    ends = [destinations.renamed(f"{name}.{leaf}").removesuffix(leaf) for leaf in LEAVES]
    whole = destinations.renamed(f"{name}.weight").removesuffix("weight")
    return {*ends} == {whole} and not any(destinations.converted(f"{name}.{leaf}") for leaf in ("weight", *LEAVES))


def _plan(folder: Folder, model: PreTrainedModel, config: Config, made: set[str]) -> DensePlan:
    """The tensors of experts, and whatever is not packed and goes to the same parameters."""
    renamed, sources, destinations = {}, {}, {}
    for weight, tensor, found, packed in _dense_tensors(folder, made):
        renamed[folder.destinations.renamed(tensor)] = found.target
        sources[tensor] = Source(weight, packed, folder.checkpoint.entry(tensor).shape)
        destinations[weight] = found
    places = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items() if name in made}
    return DensePlan(config, renamed, sources, destinations, places)


def _dense_tensors(folder: Folder, made: set[str]) -> Iterator[tuple[str, str, Destination, bool]]:
    """(weight, tensor, destination, whether a part of a packed weight)."""
    for weight, found in folder.dense.items():
        tensors = (f"{weight}.{leaf}" for leaf in LEAVES if found is not None)
        yield from ((weight, t, found, True) for t in tensors if found is not None and t in folder.checkpoint)
    yield from ((name, name, found, False) for name, found in folder.plain.items() if found.target in made)


def _check_complete(folder: Folder, model: PreTrainedModel) -> None:
    """Refuses a folder that leaves a parameter without values: transformers would make them up. CheckpointError."""
    if not folder.destinations.certain:
        return
    found = [*folder.plain.values(), *(found for found in folder.dense.values() if found is not None)]
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    reached = {target for one in found for target in one.targets} | {*tied, *tied.values()}
    patterns = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    for name, _ in model.named_parameters():
        if name not in reached and not any(pattern.search(name) for pattern in patterns):
            raise CheckpointError(f"{folder.checkpoint.folder} has no weights for {name}; {AGAIN}")
