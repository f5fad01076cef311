"""A model gone through tensor by tensor: what needs neither calibration data nor a model, whatever the architecture."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from bitwright.calibration.segments import Segments
from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.block import Outline
from bitwright.core.errors import CheckpointError, RecipeError
from bitwright.core.progress import Listener
from bitwright.core.recipe import Recipe
from bitwright.core.training import Training
from bitwright.core.weight import Division, Kept, Weight
from bitwright.model import discover
from bitwright.model.anatomy import dissect
from bitwright.model.buildable import require_buildable
from bitwright.model.chosen_weights import LEFT_OUT, Patterns, by_rules, chosen
from bitwright.model.config import model_config, text_config_of, without_hub_kernels
from bitwright.model.fitting import built_within
from bitwright.model.skeleton import Skeleton
from bitwright.model.source import Source, blaming_the_config, pick_device, sequence_length
from bitwright.model.view import ModelView, class_of
from bitwright.prepare.block_way import ALL_LEFT_OUT, OTHER
from bitwright.prepare.question import Question
from bitwright.prepare.way import HEAD, Inventory, kept_linears, loaded_by_us
from bitwright.stream.memory import Budget, estimate_tensors
from bitwright.stream.parts import PartWriter
from bitwright.stream.pipeline import TensorPlan
from bitwright.stream.ranks import Ranks
from bitwright.stream.run_plan import RunPlan
from bitwright.stream.tensors import TensorDriver
from bitwright.stream.units import Unit, block_of, units
from bitwright.stream.worker_pool import WorkerPool

LARGEST_BLOCK = 2**31
"""The most bytes of a block that is read and run to see what its linears are; names tell it of larger ones."""


@dataclass(frozen=True)
class TensorWay:
    """Every tensor of the checkpoint read in turn, and quantized or copied; see ``way.Way``."""

    source: Source
    units: tuple[Unit, ...]
    inventory: Inventory
    device: torch.device
    dtype: torch.dtype = torch.float32
    shares_out: bool = True

    @classmethod
    def open(cls, question: Question, source: Source, device: str) -> "TensorWay":
        """Find the weights.

        Raises RecipeError for patterns that fit nothing, CheckpointError for weights that do not belong together.
        """
        checkpoint, recipe = source.checkpoint, question.recipe
        view, division, tied = _known(source, recipe) if source.decoder else _discovered(checkpoint, recipe)
        division = chosen(division, Patterns.of(recipe, question.rules.left_out), checkpoint, view)
        if not division.weights:
            raise RecipeError(f"{checkpoint.folder}: nothing to quantize: {_why_nothing(division, checkpoint)}")
        in_units = tuple(units(division, checkpoint))
        return cls(source, in_units, _inventory(source, division, in_units, view, tied), pick_device(device))

    def read_calibration(self, question: Question, say: Callable[[str], None]) -> Segments | None:
        """None: no calibration data are needed."""
        sequence_length(question.recipe.seqlen, self.source.longest)
        return None

    def budget(self, tokens: Int[Tensor, "N T"] | None, training: Training | None) -> Budget:
        """The memory that one process needs."""
        return estimate_tensors(self.units, self.source.checkpoint)

    def check_weights(self, listener: Listener) -> str:
        """The times at which the system last changed the files: each tensor is checked when it is read.

        To read all weights twice would take as long as the run.
        """
        return ", ".join(f"{file} {time}" for file, time in self.source.checkpoint.changed_times().items())

    def driver(
        self,
        plan: RunPlan,
        writer: PartWriter,
        tokens: Int[Tensor, "N T"] | None,
        workers: int,
        pool: WorkerPool | None,
        ranks: Ranks,
    ) -> TensorDriver:
        """What makes the parts, in this process or in worker processes."""
        return TensorDriver(
            self.units,
            TensorPlan(self.source.checkpoint, plan, str(self.device), writer),
            workers,
            pool or WorkerPool(),
            ranks,
        )


def _inventory(
    source: Source, division: Division, in_units: tuple[Unit, ...], view: ModelView | None, tied: bool
) -> Inventory:
    weights, checkpoint = division.weights, source.checkpoint
    special, merged = loaded_by_us(division, view)
    copied_head = tied and any(weight.name == HEAD for weight in weights)
    return Inventory(
        weights=weights,
        kept={kept.tensor: kept.why for kept in division.kept},
        kept_linears=kept_linears(division, view, checkpoint, copied_head),
        as_stored=[name for unit in in_units if not unit.weights for name in unit.copied],
        units=[unit.name for unit in in_units],
        blocks=len({block for unit in in_units if (block := block_of(f"{unit.block}.")) is not None}),
        copied_head=copied_head,
        family=source.family,
        special=special,
        merged=merged,
    )


def _known(source: Source, recipe: Recipe) -> tuple[ModelView, Division, bool]:
    """The linears of a decoder like Llama's."""
    assert source.decoder is not None
    if source.config is not None:  # no ordinary config.json: whether it describes a model, only transformers can say
        with blaming_the_config(source.checkpoint.folder), built_within(source.checkpoint), torch.device("meta"):
            class_of(source.config)._from_config(source.config)
    outline = Outline.of(source.decoder)
    source.checkpoint.require_complete(outline)
    view = ModelView.of_outline(outline, source.checkpoint)
    reasons = {kept.tensor: kept.why for kept in by_rules(source.checkpoint).kept}
    names = source.checkpoint.names
    division = outline.division(recipe.quantize_lm_head, names, lambda name: reasons.get(name, OTHER))
    return view, division, recipe.quantize_lm_head and outline.tied


def _discovered(checkpoint: Checkpoint, recipe: Recipe) -> tuple[ModelView | None, Division, bool]:
    """The linears of an architecture that nobody has described."""
    view, division = ModelView.of(checkpoint), by_rules(checkpoint)
    require_buildable(checkpoint, view)
    if view is not None:
        division = _as_recorded(checkpoint, division)
    if not recipe.quantize_lm_head:
        return view, division, False
    head = discover.head(checkpoint.names)
    tensor = head or discover.embedding(checkpoint.names)
    if tensor is None:
        raise CheckpointError(
            f"{checkpoint.folder}: which tensor is the output layer cannot be told from the names; leave "
            "--quantize-lm-head out, and name it with --include PATTERN"
        )
    name = "lm_head" if head is None else head.removesuffix(".weight")
    weight = Weight(tensor, name, checkpoint.entry(tensor).shape)
    kept = tuple(entry for entry in division.kept if entry.tensor != head)
    return view, replace(division, weights=(*division.weights, weight), kept=kept), head is None


def _as_recorded(checkpoint: Checkpoint, division: Division) -> Division:
    """The division in which the model itself says what the linears of its blocks are, if those are small enough to run.

    A model that does not run here is divided by names and shapes alone.
    """
    blocks = Counter[str]()
    for name in checkpoint.names:
        blocks[block_of(name) or ""] += checkpoint.nbytes(name)
    del blocks[""]
    if not blocks or max(blocks.values()) > LARGEST_BLOCK:
        return division
    try:
        config = model_config(checkpoint)
        with built_within(checkpoint), without_hub_kernels():
            skeleton = Skeleton(checkpoint, config, checkpoint.dtype_of_weights, torch.device("cpu"))
        anatomy = dissect(skeleton, text_config_of(config).vocab_size, sites=False)
    except Exception:  # whatever a model's own code raises
        return division
    recorded = {weight.tensor: weight for block in anatomy.blocks for weight in block.weights}
    reasons = {tensor: why for block in anatomy.blocks for tensor, why in block.kept.items()}
    within = tuple(f"{block.name}." for block in anatomy.blocks)
    weights = [w for w in division.weights if not w.tensor.startswith(within)]
    kept = [k for k in division.kept if not k.tensor.startswith(within)]
    others = {entry.tensor: entry.why for entry in division.kept}
    inside = [name for name in checkpoint.names if name.startswith(within) and name not in recorded]
    kept += [Kept(name, reasons.get(name) or others.get(name) or discover.UNUSED) for name in inside]
    order = {name: place for place, name in enumerate(discover.in_order(checkpoint.names))}
    return Division(
        tuple(sorted([*weights, *recorded.values()], key=lambda weight: order[weight.tensor])),
        tuple(sorted(kept, key=lambda entry: order[entry.tensor])),
    )


def _why_nothing(division: Division, checkpoint: Checkpoint) -> str:
    """What became of the matrices, a line for each reason."""
    matrices = [kept for kept in division.kept if len(checkpoint.entry(kept.tensor).shape) == 2]
    reasons: dict[str, list[str]] = {}
    for kept in matrices:
        reasons.setdefault(kept.why, []).append(kept.tensor)
    lines = [f"  {len(names)} such as {names[0]}: {why}" for why, names in reasons.items()]
    remedy = "--include takes more"
    if LEFT_OUT in reasons:
        remedy = ALL_LEFT_OUT
    elif any(why.startswith("excluded") for why in reasons):
        remedy = "--exclude leaves nothing"
    elif reasons and reasons.keys() <= {discover.EMPTY, discover.UNNAMED}:
        remedy = "none of them can be the weight of a linear"
    return "\n".join([f"all of its {len(matrices)} matrices are kept as they are", *lines, remedy])
