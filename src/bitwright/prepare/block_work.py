"""A model gone through block by block: what a run with text needs, and what knows the architecture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from bitwright.calibration.texts import text_of
from bitwright.calibration.tokens import segments
from bitwright.core.errors import RecipeError
from bitwright.core.recipe import Recipe
from bitwright.core.scheme import Scheme
from bitwright.core.training import Training
from bitwright.core.weight import Weight
from bitwright.methods import Composition, composed_for
from bitwright.model.source import (
    Source,
    blaming_the_config,
    check_vocabulary,
    pick_device,
    pick_dtype,
    sequence_length,
    tokenize,
)
from bitwright.stream.memory import Budget, estimate
from bitwright.stream.skeleton import Skeleton


@dataclass(frozen=True)
class BlockWork:
    """Every block materialised in turn, with the calibration tokens going through; see ``work.Work``."""

    source: Source
    skeleton: Skeleton
    quantize_head: bool
    tokens: Int[Tensor, "N T"] | None = None

    @classmethod
    def of(cls, recipe: Recipe, source: Source, device: str) -> "BlockWork":
        """Raises RecipeError for an architecture that nobody has described, CheckpointError for weights that do not
        belong to the configuration."""
        if recipe.include or recipe.exclude:
            raise RecipeError(
                f"{composed_for(recipe).named} works on whole blocks here, whose linears are known; --include and "
                "--exclude go with methods that look at one weight alone (rtn, easyquant), and without --calibration"
            )
        return cls(source, skeleton_of(source, device), recipe.quantize_lm_head)

    def with_text(self, recipe: Recipe) -> "BlockWork":
        """The same with the segments of the text that was named. Raises UserError."""
        return replace(self, tokens=_calibration(recipe, self.source, composed_for(recipe)))

    @property
    def device(self) -> torch.device:
        """Where the forward passes run."""
        return self.skeleton.device

    @property
    def dtype(self) -> torch.dtype:
        """What they run in."""
        return self.skeleton.dtype

    @property
    def weights(self) -> Sequence[Weight]:
        """The linears of every block, and the output layer where that is asked for."""
        return self.skeleton.outline.weights(self.quantize_head)

    @property
    def kept(self) -> Mapping[str, str]:
        """Whatever is no linear of a block."""
        taken = {weight.tensor for weight in self.weights} if not self.copied_head else set()
        return {n: "no linear of this architecture" for n in self.source.checkpoint.names if n not in taken}

    @property
    def as_stored(self) -> Sequence[str]:
        """Embedding, final norm, output layer."""
        blocks = tuple(f"{name}." for name in self.skeleton.block_names)
        head = {f"{self.skeleton.family.head}.weight"} if self.quantize_head else set()
        return [n for n in self.source.checkpoint.names if not n.startswith(blocks) and n not in head]

    @property
    def units(self) -> Sequence[str]:
        """The blocks, and an output layer of its own."""
        return (*self.skeleton.block_names, *((self.skeleton.family.head,) if self.quantize_head else ()))

    @property
    def blocks(self) -> int:
        """How many decoder blocks there are."""
        return len(self.skeleton.block_names)

    @property
    def copied_head(self) -> bool:
        """Whether the output layer is quantized as a copy of the embedding."""
        return self.quantize_head and self.skeleton.tied

    @property
    def kept_linears(self) -> Sequence[str]:
        """The output layer, unless it is quantized."""
        return () if self.quantize_head else (self.skeleton.family.head,)

    def only_ours(self, scheme: Scheme) -> str | None:
        """None: the architectures that are described have no experts."""
        return None

    def budget(self, training: Training | None) -> Budget:
        """The memory that it needs."""
        if self.tokens is None:
            return estimate(self.skeleton, 0)
        if training is None:
            return estimate(self.skeleton, self.tokens.numel())
        step = min(training.batch_size, len(self.tokens)) * self.tokens.shape[1]
        return estimate(self.skeleton, self.tokens.numel(), step, training.aug_loss)


def skeleton_of(source: Source, device: str) -> Skeleton:
    """The model without its weights. Raises RecipeError, CheckpointError."""
    family, config = source.described()
    where = pick_device(device)
    dtype = pick_dtype("auto", where, source.checkpoint.dtype_of_weights)
    with blaming_the_config(source.checkpoint.folder):
        return Skeleton(source.checkpoint, config, family, dtype, where)


def _calibration(recipe: Recipe, source: Source, composition: Composition) -> Int[Tensor, "N T"] | None:
    _, config = source.described()
    seqlen = sequence_length(recipe.seqlen, source.longest)
    if recipe.calibration is None:
        if composition.needs_text:
            raise RecipeError(
                f"{composition.named} learns from text and none was named; "
                "give --calibration FILE.txt, or --calibration builtin"
            )
        return None
    text = text_of(recipe.calibration, "calibration")
    tokens = tokenize(source.checkpoint.folder, text)
    check_vocabulary(tokens, config, source.checkpoint.folder)
    return segments(tokens, recipe.samples, seqlen, recipe.seed, recipe.calibration)
