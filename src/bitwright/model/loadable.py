"""Whether transformers would find a place for every tensor of a folder, and a tensor for every place.

The model is built on the meta device, with the quantizer that config.json asks for. Names are compared as transformers
compares them when it loads; no weight is read.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import redirect_stderr
from copy import deepcopy
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bitwright.core.errors import CheckpointError
from bitwright.model.config import read_config
from bitwright.model.view import class_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

OLD_BUFFERS = r"rotary_emb\.inv_freq|(^|\.)position_ids$"
"""Tensors of old checkpoints that transformers leaves out without a word."""


class MissingPackageError(CheckpointError):
    """A model whose code needs a package that is not installed, so that nobody can tell whether it loads."""


@dataclass(frozen=True)
class Faults:
    """What would go wrong when a folder is loaded.

    ``unclaimed`` are tensors that no parameter or buffer of the model takes, ``empty`` the parameters that no tensor
    fills. Shapes are not compared: with a quantizer, transformers does not either.
    """

    unclaimed: frozenset[str]
    empty: frozenset[str]

    def beyond(self, original: "Faults") -> str | None:
        """The first fault that the original has not, in words; None if there is none."""
        unclaimed, empty = _beyond(self.unclaimed, original.unclaimed), _beyond(self.empty, original.empty)
        if unclaimed:
            return f"{unclaimed[0]} has no place in the model that transformers makes{_others(unclaimed)}"
        if empty:
            return f"no tensor fills {empty[0]} of the model that transformers makes{_others(empty)}"
        return None


def config_in(folder: Path) -> "PretrainedConfig | None":
    """The config in a folder; None if transformers does not know the architecture, or has no model of it."""
    try:
        config = read_config(folder)
        class_of(config)
    except Exception:  # transformers raises anything for a config that it does not know
        return None
    return config


def faults(config: "PretrainedConfig", tensors: Collection[str], files: list[str] | None = None) -> Faults:
    """The faults of loading tensors into the model of a config, quantized as the config says.

    ``files`` are the paths of the weight files, if there are any: the bitwright format looks into them. Raises
    CheckpointError if transformers, or our plugin, refuses them, MissingPackageError if a package is missing.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    config = deepcopy(config)
    try:
        with redirect_stderr(StringIO()):  # compressed-tensors shows a bar per model
            quantizer = _quantizer(config)
            model = _built(config, quantizer, files)
            conversions = get_model_conversion_mapping(model, None, quantizer)
            _initialized(model)
    except CheckpointError:
        raise
    except ImportError as error:
        raise MissingPackageError(f"a package is missing: {error}") from error
    except Exception as error:  # the libraries raise anything
        raise CheckpointError(f"transformers cannot load it: {type(error).__name__}: {error}") from error
    return _compared(model, tensors, conversions)


def _quantizer(config: "PretrainedConfig") -> Any:
    from transformers.quantizers.auto import get_hf_quantizer

    if getattr(config, "quantization_config", None) is None:
        return None
    quantizer, *_ = get_hf_quantizer(config, None, None, False, {})
    return quantizer


def _built(config: "PretrainedConfig", quantizer: Any, files: list[str] | None) -> "PreTrainedModel":
    with torch.device("meta"):
        model: PreTrainedModel = class_of(config)._from_config(config)
        if quantizer is not None:
            quantizer.preprocess_model(model=model, dtype=model.dtype, device_map=None, checkpoint_files=files)
    return model


def _initialized(model: "PreTrainedModel") -> None:
    """Let the model initialize what has no weights, as after loading: some ask a linear for its ``weight`` then."""
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True  # the mark of transformers
    model.initialize_weights()


def _compared(model: "PreTrainedModel", tensors: Collection[str], conversions: list[Any]) -> Faults:
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state, prefix = dict(model.state_dict()), model.base_model_prefix
    filled = {name for converter in converters for name in getattr(converter, "makes", ())}
    unclaimed = set[str]()
    for name in tensors:
        place, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if place not in state and name in state:
            place, pattern = rename_source_key(name, [], [], prefix, state)
        if place not in state:
            unclaimed.add(name)
        elif pattern is None:
            filled.add(place)
        else:
            filled |= set(_targets(place, by_pattern[pattern]))
    return Faults(
        frozenset(name for name in unclaimed if not _fits(name, [OLD_BUFFERS, *_patterns(model, "unexpected")])),
        frozenset(name for name in _empty(model, state, filled) if not _fits(name, _patterns(model, "missing"))),
    )


def _targets(place: str, converter: Any) -> Iterator[str]:
    first, *_ = converter.target_patterns
    return (place.replace(first, pattern) for pattern in converter.target_patterns)


def _empty(model: "PreTrainedModel", state: Mapping[str, object], filled: set[str]) -> Iterator[str]:
    """The places that nothing fills; of those that are tied, one is enough."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    together: dict[str, set[str]] = {}
    for name, source in tied.items():
        together.setdefault(source, {source}).add(name)
    shared = {name: names for names in together.values() for name in names}
    return (name for name in state if name not in filled and not shared.get(name, set()) & filled)


def _patterns(model: "PreTrainedModel", which: str) -> list[str]:
    return list(getattr(model, f"_keys_to_ignore_on_load_{which}", None) or ())


def _fits(name: str, patterns: list[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _beyond(names: Collection[str], known: Collection[str]) -> list[str]:
    """The names that are not known, whether quantized (X.weight_packed) or not (X.weight, or X of experts)."""
    stems = {*known, *(name.removesuffix(".weight") for name in known)}
    return sorted(name for name in names if name not in stems and name.rpartition(".")[0] not in stems)


def _others(names: list[str]) -> str:
    return f" ({len(names)} tensors)" if len(names) > 1 else ""
