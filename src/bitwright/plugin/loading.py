"""A folder loaded into a model, with what the installed transformers has for it."""

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
    """Packs every linear that the config converts: nothing is said of a folder, the tensors are given by hand."""
    pack_linears(model, config, _own_names(model, config))


def without_conversions(model: PreTrainedModel, config: Config, folder: Path) -> None:
    """Where transformers keeps its conversions to itself: linears, by the names that they have in the folder.

    Raises CheckpointError for a folder with experts.
    """
    found = look_into(Checkpoint.open(folder), model, config, ())
    check_names(found, model, config)
    if found.dense:
        raise _cannot_load(folder, next(iter(found.dense)))
    names = _own_names(model, config)
    check_headers(pack_linears(model, config, names), names, found.checkpoint)


def with_conversions(
    model: PreTrainedModel, config: Config, folder: Path, conversions: list[Any]
) -> tuple[DensePlan, list[FromPacked]]:
    """Packs linears and plans experts. Returns the plan, and what transformers has to ask before its conversions."""
    plan = arrange(look_into(Checkpoint.open(folder), model, config, conversions), model, config)
    return plan, [FromPacked(plan)] if plan.destinations else []


def check_loaded(folder: Path, plan: DensePlan | None) -> None:
    """Refuses a transformers that did not do as it was asked, after the fact. CheckpointError."""
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
