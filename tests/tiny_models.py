"""Tiny models of any architecture that transformers knows, with random weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from tests.streamed import subject_of
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from bitwright.stream.subject import Subject

Change = Callable[[PreTrainedModel], object]


@torch.no_grad()
def drawn(config: PretrainedConfig) -> PreTrainedModel:
    """A model in float32 whose norms, biases and weights all differ from channel to channel."""
    model = cast("PreTrainedModel", AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(values / parameter.shape[-1] ** 0.5)
        else:
            parameter.add_(0.2 * values * (1 if name.endswith(("weight", "bias")) else 0.1))
    return cast("PreTrainedModel", model.eval())


def saved(config: PretrainedConfig, folder: Path, change: Change = lambda model: None) -> tuple[Path, PreTrainedModel]:
    """Such a model, perhaps changed, and the folder that transformers writes it to."""
    model = drawn(config)
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder)
    return folder, model


def dissected(
    config: PretrainedConfig, folder: Path, change: Change = lambda model: None
) -> tuple[Subject, PreTrainedModel]:
    """Such a model as Bitwright sees it once it is written to a folder, and as transformers does."""
    path, model = saved(config, folder, change)
    return subject_of(path), model


def config_of(kind: str, **sizes: Any) -> PretrainedConfig:
    """The config of a ``model_type``."""
    return AutoConfig.for_model(kind, **sizes)


def linears_in(module: nn.Module) -> set[str]:
    """The names of a module's ``nn.Linear``."""
    return {name for name, part in module.named_modules() if isinstance(part, nn.Linear)}
