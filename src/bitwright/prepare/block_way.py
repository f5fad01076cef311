"""The way through a model block by block, for methods with calibration data."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from bitwright.calibration.segments import Segments, calibration_segments
from bitwright.core.block import Family, Outline, Topology
from bitwright.core.errors import RecipeError
from bitwright.core.progress import Listener, Progress
from bitwright.core.training import Training
from bitwright.core.weight import Division, Kept
from bitwright.model.anatomy import dissect
from bitwright.model.chosen_weights import Patterns, by_rules, chosen
from bitwright.model.config import text_config_of, without_hub_kernels
from bitwright.model.fitting import built_within
from bitwright.model.skeleton import Skeleton
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
from bitwright.prepare.way import Inventory, kept_linears, loaded_by_us
from bitwright.stream.blocks import BlockDriver
from bitwright.stream.memory import Budget, estimate, peak_memory
from bitwright.stream.parts import PartWriter
from bitwright.stream.ranks import Ranks
from bitwright.stream.run_plan import RunPlan
from bitwright.stream.subject import Subject
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
    subject: Subject
    inventory: Inventory
    shares_out: bool = False

    @classmethod
    def open(cls, question: Question, source: Source, device: str) -> "BlockWay":
        """Find the linears of the blocks.

        Raises RecipeError for a model without blocks and for patterns that fit nothing, CheckpointError for weights
        that do not belong to the configuration.
        """
        if question.recipe.include:
            raise RecipeError(
                f"{question.composition.named} works on whole blocks here, whose linears are known; --include goes "
                "with methods that look at one weight alone (rtn, easyquant), and without --calibration"
            )
        subject = subject_of(source, device)
        return cls(source, subject, _inventory(question, source, subject))

    @property
    def device(self) -> torch.device:
        """The device of the forward passes."""
        return self.subject.skeleton.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that forward passes run in."""
        return self.subject.skeleton.dtype

    def read_calibration(self, question: Question, say: Callable[[str], None]) -> Segments | None:
        """The calibration segments, None if no calibration data are named; see ``way.Way``."""
        recipe, config = question.recipe, text_config_of(self.subject.skeleton.model.config)
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
            return estimate(self.subject, 0)
        if training is None:
            return estimate(self.subject, tokens.numel())
        step = min(training.batch_size, len(tokens)) * tokens.shape[1]
        return estimate(self.subject, tokens.numel(), step, training.aug_loss)

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
        return BlockDriver(self.subject, plan, writer, tokens)


def subject_of(source: Source, device: str) -> Subject:
    """The model without its weights, and its anatomy. Raises RecipeError, CheckpointError."""
    config, checkpoint = source.to_build(), source.checkpoint
    where = pick_device(device)
    dtype = pick_dtype("auto", where, checkpoint.dtype_of_weights)
    with blaming_the_config(checkpoint.folder), built_within(checkpoint), without_hub_kernels():
        skeleton = Skeleton(checkpoint, config, dtype, where)
    _require_complete(skeleton)
    with blaming_the_config(checkpoint.folder):
        anatomy = dissect(skeleton, text_config_of(config).vocab_size)
    return Subject.of(skeleton, anatomy)


def _require_complete(skeleton: Skeleton) -> None:
    """Raise CheckpointError if tensors are missing or have other shapes than config.json asks for."""
    checkpoint, sources = skeleton.checkpoint, skeleton.sources
    shapes = dict[str, tuple[int, ...]]()
    for name, parameter in skeleton.model.named_parameters():
        whole = sources.whole(name)
        if whole is not None or not sources.tensors(name):
            shapes[whole or name] = tuple(parameter.shape)
    tied = set(getattr(skeleton.model, "all_tied_weights_keys", None) or ())
    blocks = tuple(skeleton.parts)
    checkpoint.require_complete(Outline({n: s for n, s in shapes.items() if n not in tied}, (), blocks, False))


def _inventory(question: Question, source: Source, subject: Subject) -> Inventory:
    checkpoint, blocks, head = source.checkpoint, subject.anatomy.blocks, subject.head
    view = ModelView.of_model(subject.skeleton.model, checkpoint.names)
    wanted = [*blocks, *((head,) if question.recipe.quantize_lm_head and head is not None else ())]
    weights = tuple(weight for block in wanted for weight in block.weights)
    reasons = {kept.tensor: kept.why for kept in by_rules(checkpoint).kept}
    reasons |= {tensor: why for block in blocks for tensor, why in block.kept.items()}
    copied = head is not None and head in wanted and head.weights[0].tensor != f"{head.path}.weight"
    taken = {weight.tensor for weight in weights} - ({head.weights[0].tensor} if copied and head else set())
    kept = tuple(Kept(name, reasons.get(name, OTHER)) for name in checkpoint.names if name not in taken)
    division = Division(weights, kept)
    if question.rules.excluded or question.rules.left_out:
        division = chosen(division, Patterns.of(question.recipe, question.rules.left_out), checkpoint, None)
    quantized = {weight.name for weight in division.weights}
    if not quantized:
        remedy = ALL_LEFT_OUT if question.rules.left_out else "--exclude leaves nothing"
        raise RecipeError(f"{checkpoint.folder}: nothing to quantize: {remedy}")
    within = tuple(f"{block.name}." for block in blocks)
    outside = [name for name in checkpoint.names if not name.startswith(within)]
    has_head = head is not None and head.path in quantized
    special, merged = loaded_by_us(division, view)
    return Inventory(
        weights=division.weights,
        kept={kept.tensor: kept.why for kept in division.kept},
        kept_linears=kept_linears(division, view, checkpoint, copied and has_head),
        as_stored=[name for name in outside if not (has_head and head and name == f"{head.path}.weight")],
        units=(*(block.name for block in blocks), *((head.path,) if has_head and head else ())),
        blocks=len(blocks),
        copied_head=copied and has_head,
        family=source.family or _family(subject),
        topology=max((block.topology for block in blocks), key=_richness),
        special=special,
        merged=merged,
    )


def _richness(topology: Topology) -> tuple[bool, int]:
    return any(site.shift for site in topology.sites), len(topology.sites)


def _family(subject: Subject) -> Family | None:
    """What formats ask about an architecture whose activations are quantized; None if attention is not certain."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    classes, widths, linears = set[str](), set[int](), set[frozenset[str]]()
    for block in subject.anatomy.blocks:
        module = subject.skeleton.model.get_submodule(block.path)
        attention = [part for part in module.modules() if hasattr(part, "config") and hasattr(part, "scaling")]
        width = getattr(attention[0], "head_dim", None) if len(attention) == 1 else None
        config: Any = attention[0].config if attention else None
        if not isinstance(width, int) or config._attn_implementation not in ALL_ATTENTION_FUNCTIONS:
            return None  # eager is the model's own function: its queries, keys and values are out of reach
        classes.add(type(attention[0]).__name__)
        widths.add(width)
        linears.add(frozenset(name for name, part in attention[0].named_modules() if isinstance(part, nn.Linear)))
    # blocks without keys of their own read another block's, which no client quantizes there
    return Family(classes.pop(), widths.pop()) if len(classes) == len(widths) == len(linears) == 1 else None
