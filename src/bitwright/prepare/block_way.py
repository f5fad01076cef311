"""The way through a model block by block, for methods with calibration data; the architecture must be described."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from bitwright.calibration.segments import Segments, calibration_segments
from bitwright.core.errors import RecipeError
from bitwright.core.progress import Listener, Progress
from bitwright.core.training import Training
from bitwright.model.chosen_weights import Patterns, by_rules, chosen
from bitwright.model.fitting import built_within
from bitwright.model.source import (
    Source,
    blaming_the_config,
    check_vocabulary,
    open_tokenizer,
    pick_device,
    pick_dtype,
    sequence_length,
)
from bitwright.model.view import ModelView
from bitwright.prepare.question import Question
from bitwright.prepare.way import Inventory
from bitwright.stream.blocks import BlockDriver
from bitwright.stream.memory import Budget, estimate, peak_memory
from bitwright.stream.parts import PartWriter
from bitwright.stream.ranks import Ranks
from bitwright.stream.run_plan import RunPlan
from bitwright.stream.skeleton import Skeleton
from bitwright.stream.worker_pool import WorkerPool

OTHER = "no linear of this architecture"
ALL_LEFT_OUT = (
    "--allocation leaves nothing: give linears in the file a scheme in the place of null, or --scheme-for "
    "'PATTERN=SCHEME', which takes precedence over the file"
)


@dataclass(frozen=True)
class BlockWay:
    """Every block in memory in turn, with the calibration data going through; see ``way.Way``."""

    source: Source
    skeleton: Skeleton
    inventory: Inventory
    shares_out: bool = False

    @classmethod
    def open(cls, question: Question, source: Source, device: str) -> "BlockWay":
        """Find the linears of the blocks.

        Raises RecipeError for an architecture that nobody has described and for patterns that fit nothing,
        CheckpointError for weights that do not belong to the configuration.
        """
        if question.recipe.include:
            raise RecipeError(
                f"{question.composition.named} works on whole blocks here, whose linears are known; --include goes "
                "with methods that look at one weight alone (rtn, easyquant), and without --calibration"
            )
        skeleton = skeleton_of(source, device)
        return cls(source, skeleton, _inventory(question, source, skeleton))

    @property
    def device(self) -> torch.device:
        """The device of the forward passes."""
        return self.skeleton.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that forward passes run in."""
        return self.skeleton.dtype

    def read_calibration(self, question: Question, say: Callable[[str], None]) -> Segments | None:
        """The calibration segments, None if no calibration data are named; see ``way.Way``."""
        recipe, (_, config) = question.recipe, self.source.described()
        seqlen = sequence_length(recipe.seqlen, self.source.longest)
        if recipe.calibration is None:
            if question.composition.needs_text:
                raise RecipeError(
                    f"{question.composition.named} learns from calibration data and none were named; "
                    "give --calibration FILE.txt, or --calibration builtin"
                )
            return None
        segments = calibration_segments(
            recipe.calibration,
            open_tokenizer(self.source.checkpoint.folder),
            samples=recipe.samples,
            seqlen=seqlen,
            seed=recipe.seed,
            field=recipe.text_field,
            say=say,
        )
        check_vocabulary(segments.tokens, config, self.source.checkpoint.folder)
        return segments

    def budget(self, tokens: Int[Tensor, "N T"] | None, training: Training | None) -> Budget:
        """The memory that a run needs."""
        if tokens is None:
            return estimate(self.skeleton, 0)
        if training is None:
            return estimate(self.skeleton, tokens.numel())
        step = min(training.batch_size, len(tokens)) * tokens.shape[1]
        return estimate(self.skeleton, tokens.numel(), step, training.aug_loss)

    def check_weights(self, listener: Listener) -> str:
        """Look for NaN before the hours of work, and return a digest of all weights. Raises CheckpointError."""
        checkpoint = self.source.checkpoint

        def checked(done: int, total: int) -> None:
            listener(Progress("check", done, total, "bytes", peak_memory()))

        return checkpoint.check_finite(checked)

    def driver(
        self,
        plan: RunPlan,
        writer: PartWriter,
        tokens: Int[Tensor, "N T"] | None,
        workers: int,
        pool: WorkerPool | None,
        ranks: Ranks,
    ) -> BlockDriver:
        """What makes the parts; one process does it."""
        return BlockDriver(self.skeleton, plan, writer, tokens)


def skeleton_of(source: Source, device: str) -> Skeleton:
    """The model without its weights. Raises RecipeError, CheckpointError."""
    family, config = source.described()
    where = pick_device(device)
    dtype = pick_dtype("auto", where, source.checkpoint.dtype_of_weights)
    with blaming_the_config(source.checkpoint.folder), built_within(source.checkpoint):
        return Skeleton(source.checkpoint, config, family, dtype, where)


def _inventory(question: Question, source: Source, skeleton: Skeleton) -> Inventory:
    outline, with_head = skeleton.outline, question.recipe.quantize_lm_head
    head = outline.family.head
    reasons = {kept.tensor: kept.why for kept in by_rules(source.checkpoint).kept}
    division = outline.division(with_head, source.checkpoint.names, lambda name: reasons.get(name, OTHER))
    if question.rules.excluded or question.rules.left_out:
        patterns = Patterns.of(question.recipe, question.rules.left_out)
        division = chosen(division, patterns, source.checkpoint, ModelView.of_outline(outline, source.checkpoint))
    quantized = {weight.name for weight in division.weights}
    within = tuple(f"{name}." for name in outline.blocks)
    stored = [name for name in source.checkpoint.names if not name.startswith(within)]
    if not quantized:
        remedy = ALL_LEFT_OUT if question.rules.left_out else "--exclude leaves nothing"
        raise RecipeError(f"{source.checkpoint.folder}: nothing to quantize: {remedy}")
    return Inventory(
        weights=division.weights,
        kept={kept.tensor: kept.why for kept in division.kept},
        kept_linears=tuple(name for name in (*outline.linears, head) if name not in quantized),
        as_stored=[name for name in stored if head not in quantized or name != f"{head}.weight"],
        units=(*outline.blocks, *((head,) if head in quantized else ())),
        blocks=len(outline.blocks),
        copied_head=head in quantized and outline.tied,
    )
