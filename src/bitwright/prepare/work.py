"""How a model is gone through: block by block, or tensor by tensor."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from bitwright.core.format import Foreseen
from bitwright.core.recipe import Recipe
from bitwright.core.scheme import Scheme
from bitwright.core.training import Training
from bitwright.core.weight import Weight
from bitwright.methods import Composition
from bitwright.model.source import Source
from bitwright.prepare.block_work import BlockWork
from bitwright.prepare.tensor_work import TensorWork
from bitwright.stream.memory import Budget


class Work(Protocol):
    """``BlockWork`` or ``TensorWork``."""

    def with_text(self, recipe: Recipe) -> "Work":
        """The same with the segments of the text that was named."""

    @property
    def tokens(self) -> Int[Tensor, "N T"] | None:
        """The calibration segments, None where no text was named."""

    @property
    def device(self) -> torch.device:
        """Where the arithmetic is done."""

    @property
    def dtype(self) -> torch.dtype:
        """What it is done in."""

    @property
    def weights(self) -> Sequence[Weight]:
        """What will be quantized, in the order of the model."""

    @property
    def kept(self) -> Mapping[str, str]:
        """The tensors that stay as they are, and why."""

    @property
    def as_stored(self) -> Sequence[str]:
        """Those of all tensors that are copied from the checkpoint when everything else is there, and in no part."""

    @property
    def units(self) -> Sequence[str]:
        """Names of what is written part by part, in the order of the model."""

    @property
    def blocks(self) -> int:
        """How many decoder blocks there are."""

    @property
    def copied_head(self) -> bool:
        """Whether an output layer that shares its weight with the embedding gets a weight of its own."""

    @property
    def kept_linears(self) -> Sequence[str]:
        """The linears of the model that stay as they are, by their names in it."""

    def only_ours(self, scheme: Scheme) -> str | None:
        """A weight for whose sake transformers needs our plugin, whatever its codes."""

    def budget(self, training: Training | None) -> Budget:
        """The memory that it needs."""


def opened(recipe: Recipe, composition: Composition, device: str, *, tokenizer: bool) -> tuple[Source, Work]:
    """The model of a recipe, and the way that its methods take through it; no weight is read. Raises UserError, also,
    with ``tokenizer``, where the model has none."""
    free = recipe.calibration is None and composition.data_free
    source = Source.open(Path(recipe.model), to_build=not free, tokenizer=tokenizer)
    return source, (TensorWork if free else BlockWork).of(recipe, source, device)


def foreseen(source: Source, work: Work, scheme: Scheme) -> Foreseen:
    """The quantized model as far as names and shapes tell."""
    linears = {weight.name: weight.shape for weight in work.weights}
    passed = [name for name in source.checkpoint.names if name.removesuffix(".weight") not in linears]
    return Foreseen(linears, passed, scheme.weight, scheme.tile)
