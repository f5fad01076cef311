"""Whether a folder that has just been written loads as its client would load it, asked before it is published.

The model is built on the meta device, with the quantizer that config.json asks for, and names are compared; no weight
is read. A small model is loaded for good, and run on a few tokens.
"""

from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from transformers import PreTrainedModel

from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.errors import CheckpointError, UserError
from bitwright.evaluation.loading import load_as_named, load_codes
from bitwright.formats import CONFIG, QuantizedFolder, is_made_dense
from bitwright.model.loadable import Faults, config_in, faults
from bitwright.model.quantized_original import DequantizedCheckpoint
from bitwright.model.view import ModelView, with_stacks
from bitwright.verification.findings import Check
from bitwright.verification.random_tokens import cannot_run, random_tokens

SMALL = 100_000_000
"""The number of parameters up to which a model is loaded for good and run: 200 MB at 16 bits."""
LOADS = "loads"


def loads(folder: Path, original: Checkpoint) -> Check:
    """Check that every tensor has a place in the client's model, and every parameter a tensor.

    Faults that the original has too are not held against the folder. ``original`` may itself be quantized.
    """
    model, config = QuantizedFolder.open(folder), config_in(folder)
    if config is None:
        return Check(LOADS, None, f"not looked at: transformers does not know '{model.config.get('model_type')}'")
    by_itself = not is_made_dense(model.checkpoint)
    if not by_itself:
        del config.quantization_config
    names = list(model.checkpoint.names) if by_itself else _dense_names(model)
    try:
        before = _faults_of(original)
    except CheckpointError as error:
        return Check(LOADS, None, f"not looked at: the original does not load either: {error}")
    try:
        fault = faults(config, names, _files(model.checkpoint)).beyond(before)
        if fault is None and sum(map(prod, _shapes(model).values())) <= SMALL:
            fault = _fault_when_run(model, original, by_itself)
    except CheckpointError as error:
        fault = str(error)
    client = "in transformers" if by_itself else "decoded by Bitwright, not in its own client"
    return Check(LOADS, fault is None, fault or f"loads {client}")


def _faults_of(original: Checkpoint) -> Faults:
    """The faults of the original; none if it is quantized in a way that transformers does not load."""
    config = config_in(original.folder)
    if config is None or is_made_dense(original):
        return Faults(frozenset(), frozenset())
    if isinstance(original, DequantizedCheckpoint):
        del config.quantization_config
    return faults(config, original.names, _files(original))


def _files(checkpoint: Checkpoint) -> list[str]:
    return sorted({str(checkpoint.file(name)) for name in checkpoint.names})


def _dense_names(model: QuantizedFolder) -> list[str]:
    return [*model.passed, *(f"{name}.weight" for name in model.linears), *_stacks(model)]


def _stacks(model: QuantizedFolder) -> list[str]:
    view = ModelView.of(model.checkpoint, with_stacks(model.stacks)) if model.stacks else None
    return [name if view is None else view.stack(name) for name in model.stacks]


def _shapes(model: QuantizedFolder) -> Mapping[str, tuple[int, ...]]:
    return {name: model.shape(name) for name in (*model.passed, *model.linears, *model.stacks)}


def _fault_when_run(model: QuantizedFolder, original: Checkpoint, by_itself: bool) -> str | None:
    """What goes wrong when the model is loaded and computes logits, if it does not with the original too."""
    loaded = load_as_named(model.folder) if by_itself else load_codes(model)
    if cannot_run(model.config) is not None:
        return None
    fault = _fault_of_logits(loaded, model.folder)
    if fault is None or CONFIG in original.config or isinstance(original, DequantizedCheckpoint):
        return fault
    try:
        return fault if _fault_of_logits(load_as_named(original.folder), original.folder) is None else None
    except UserError:
        return None


@torch.no_grad()
def _fault_of_logits(model: PreTrainedModel, folder: Path) -> str | None:
    try:
        logits = model(random_tokens(folder), use_cache=False).logits
    except Exception as error:  # a model raises anything
        return f"it loads, but cannot run: {type(error).__name__}: {error}"
    return None if bool(logits.isfinite().all()) else "its logits are NaN or infinite"
