"""Whether a folder that has just been written loads as its client would load it, asked before it is published.

The model is built on the meta device, with the quantizer that config.json asks for, and names are compared; no weight
is read. A small model is loaded for good, and run on a few tokens.
"""

from collections.abc import Mapping
from contextlib import suppress
from math import prod
from pathlib import Path

import torch
from transformers import PreTrainedModel

from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.errors import CheckpointError, UserError
from bitwright.evaluation.loading import load_as_named, load_codes
from bitwright.formats import CONFIG, QuantizedFolder, is_made_dense
from bitwright.model.buildable import unseen
from bitwright.model.config import code_from_elsewhere
from bitwright.model.loadable import Faults, MissingPackageError, config_in, faults
from bitwright.model.quantized_original import DequantizedCheckpoint
from bitwright.model.view import ModelView, with_stacks
from bitwright.verification.findings import Check
from bitwright.verification.random_tokens import cannot_run, random_tokens
from bitwright.verification.soundness import SMALL

LOADS = "loads"
NONE = Faults(frozenset(), frozenset())


def loads(folder: Path, original: Checkpoint) -> Check:
    """Check that every tensor has a place in the client's model, and every parameter a tensor; run it if it is small.

    Tensors of the original that no model takes are not held against the folder. ``original`` may itself be quantized.
    Raises CheckpointError if it is the original that does not load or run.
    """
    model, config = QuantizedFolder.open(folder), config_in(folder)
    if config is None:
        return _not_seen(unseen(model.config))
    by_itself = not is_made_dense(model.checkpoint)
    if not by_itself:
        del config.quantization_config
    names = list(model.checkpoint.names) if by_itself else _dense_names(model)
    small, fault = sum(map(prod, _shapes(model).values())) <= SMALL, None
    try:
        before = _faults_of(original)
        try:
            fault = faults(config, names, _files(model.checkpoint)).beyond(before)
            if fault is None and small:
                fault = _fault_when_run(model, by_itself)
        except MissingPackageError:
            raise
        except CheckpointError as error:
            fault = str(error)
        if fault is not None and (of_original := _fault_of_original(original, small)) is not None:
            raise _broken(original, of_original)
    except MissingPackageError as error:
        return _not_seen(str(error))
    if fault is None and (code := code_from_elsewhere(model.config)) is not None:
        return _not_seen(f"config.json asks for {code}, which takes a package of its own; without it, this loads")
    client = "in transformers" if by_itself else "decoded by Bitwright, not in its own client"
    return Check(LOADS, fault is None, fault or f"loads {client}{_not_run(model, small)}")


def require_running(original: Checkpoint) -> None:
    """Raise CheckpointError if a small model in full precision does not load, or computes logits that are no numbers.

    One that transformers does not know passes.
    """
    with suppress(MissingPackageError):
        small = sum(map(prod, original.shapes.values())) <= SMALL and config_in(original.folder) is not None
        if (fault := _fault_of_original(original, small)) is not None:
            raise _broken(original, fault)


def _not_seen(why: str) -> Check:
    return Check(LOADS, None, f"whether it loads is not seen: {why}")


def _not_run(model: QuantizedFolder, small: bool) -> str:
    """Why a model that loads was not run, as the findings go on; nothing if it was."""
    why = cannot_run(model.config) if small else f"it has more than {SMALL:,} parameters"
    return "" if why is None else f"; not run: {why}"


def _faults_of(original: Checkpoint) -> Faults:
    """The faults of the original; none if it is quantized in a way that transformers does not load.

    Raises CheckpointError if it is not quantized and transformers refuses it, or would make weights up.
    """
    config, quantized = config_in(original.folder), CONFIG in original.config
    if config is None or is_made_dense(original):
        return NONE
    if isinstance(original, DequantizedCheckpoint):
        del config.quantization_config
    try:
        of_original = faults(config, original.names, _files(original))
    except MissingPackageError:
        raise
    except CheckpointError as error:
        if quantized:  # a sound copy of it may be what was asked for
            return NONE
        raise _broken(original, str(error)) from error
    if of_original.empty and not quantized:
        raise _broken(original, str(of_original.beyond(Faults(of_original.unclaimed, frozenset()))))
    return of_original


def _broken(original: Checkpoint, fault: str) -> CheckpointError:
    return CheckpointError(
        f"{original.folder} is at fault, and what was written of it is not published: {fault}. Compare config.json and "
        "weights with the original repository's, or download both again"
    )


def _files(checkpoint: Checkpoint) -> list[str]:
    return sorted({str(checkpoint.file(name)) for name in checkpoint.names})


def _dense_names(model: QuantizedFolder) -> list[str]:
    return [*model.passed, *(f"{name}.weight" for name in model.linears), *_stacks(model)]


def _stacks(model: QuantizedFolder) -> list[str]:
    view = ModelView.of(model.checkpoint, with_stacks(model.stacks)) if model.stacks else None
    return [name if view is None else view.stack(name) for name in model.stacks]


def _shapes(model: QuantizedFolder) -> Mapping[str, tuple[int, ...]]:
    return {name: model.shape(name) for name in (*model.passed, *model.linears, *model.stacks)}


def _fault_when_run(model: QuantizedFolder, by_itself: bool) -> str | None:
    """What goes wrong when the model is loaded and computes logits; None if nothing does, or if it has no logits."""
    loaded = load_as_named(model.folder) if by_itself else load_codes(model)
    return None if cannot_run(model.config) is not None else _fault_of_logits(loaded, model.folder)


def _fault_of_original(original: Checkpoint, small: bool) -> str | None:
    """What goes wrong when the original is loaded and computes logits, if it is small and not quantized itself."""
    if not small or CONFIG in original.config or isinstance(original, DequantizedCheckpoint):
        return None
    try:
        loaded = load_as_named(original.folder)
    except MissingPackageError:
        raise
    except UserError as error:
        return str(error)
    return None if cannot_run(original.config) is not None else _fault_of_logits(loaded, original.folder)


@torch.no_grad()
def _fault_of_logits(model: PreTrainedModel, folder: Path) -> str | None:
    """What goes wrong when a model computes logits. Raises MissingPackageError for a package that its code needs."""
    try:
        logits = model(random_tokens(folder)).logits  # with a cache, if that is what config.json asks for
    except ImportError as error:
        raise MissingPackageError(f"a package is missing: {error}") from error
    except Exception as error:  # a model raises anything
        return f"it loads, but cannot run: {type(error).__name__}: {error}"
    return None if bool(logits.isfinite().all()) else "its logits are NaN or infinite"
