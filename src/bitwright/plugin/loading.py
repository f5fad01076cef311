"""Prepare a model for a folder's tensors, as the installed transformers allows."""

from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel

from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.errors import CheckpointError
from bitwright.formats.bitwright.config import Config
from bitwright.plugin.arrangement import arrange, check_names, look_into
from bitwright.plugin.dense_loading import DensePlan, FromPacked
from bitwright.plugin.packed_model import check_headers, linears_of, pack_linears

INSTEAD = "update transformers (5.22.2 is known to work), or quantize the model again with --format dense"


def without_folder(model: nn.Module, config: Config) -> None:
    """Pack every linear that the config names; there is no folder, because the user gives the tensors."""
    pack_linears(model, config, _own_names(model, config))


def without_conversions(model: PreTrainedModel, config: Config, folder: Path) -> None:
    """Pack linears by their names in the folder, for a transformers that does not hand out its conversions.

    Raises CheckpointError for a folder with experts.
    """
    contents = look_into(Checkpoint.open(folder), model, config, ())
    check_names(contents, model, config)
    if contents.dense:
        raise _cannot_load(folder, next(iter(contents.dense)))
    names = _own_names(model, config)
    check_headers(pack_linears(model, config, names), names, contents.checkpoint)


def with_conversions(
    model: PreTrainedModel, config: Config, folder: Path, conversions: list[Any]
) -> tuple[DensePlan, list[FromPacked]]:
    """Pack linears and plan experts; return the plan, and the converters that go before transformers' own."""
    plan = arrange(look_into(Checkpoint.open(folder), model, config, conversions), model, config)
    return plan, [FromPacked(plan)] if plan.destinations else []


def check_loaded(folder: Path, plan: DensePlan | None) -> None:
    """Raise CheckpointError if transformers did not load all that it was asked to."""
    if plan is None:
        raise _cannot_load(folder, "anything")
    if plan.missing:
        raise _cannot_load(folder, plan.missing[0])


def _own_names(model: nn.Module, config: Config) -> dict[str, str]:
    return {name: name for name in linears_of(model) if name not in config.modules_to_not_convert}


def _cannot_load(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{folder}: transformers {transformers.__version__} does not load {what} for the bitwright format; {INSTEAD}"
    )
