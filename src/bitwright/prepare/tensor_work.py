"""A model gone through tensor by tensor: what needs neither text nor a model, whatever the architecture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.errors import CheckpointError, RecipeError
from bitwright.core.outline import Outline
from bitwright.core.recipe import Recipe
from bitwright.core.scheme import Scheme
from bitwright.core.training import Training
from bitwright.core.weight import Division, Kept, Weight
from bitwright.model import discover
from bitwright.model.chosen_weights import Patterns, chosen
from bitwright.model.source import Source, pick_device, sequence_length
from bitwright.model.view import ModelView
from bitwright.prepare.block_work import skeleton_of
from bitwright.stream.memory import Budget, estimate_tensors
from bitwright.stream.units import Unit, block_of, units


@dataclass(frozen=True)
class TensorWork:
    """Every tensor of the checkpoint read in turn, and quantized or copied; see ``work.Work``.

    ``view`` is None for an architecture that transformers does not know.
    """

    source: Source
    division: Division
    view: ModelView | None
    device: torch.device
    copied_head: bool
    tokens: Int[Tensor, "N T"] | None = None
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, recipe: Recipe, source: Source, device: str) -> "TensorWork":
        """Raises RecipeError for patterns that fit nothing, CheckpointError for weights that do not belong together."""
        checkpoint = source.checkpoint
        view, found, tied = _known(source, recipe, device) if source.family else _discovered(checkpoint, recipe)
        patterns = Patterns.of(recipe)
        division = chosen(found, patterns, checkpoint, view)
        if not division.weights:
            raise RecipeError(f"{checkpoint.folder}: nothing to quantize: {_why_nothing(division, checkpoint)}")
        return cls(source, division, view, pick_device(device), tied)

    def with_text(self, recipe: Recipe) -> "TensorWork":
        """The same: no text is needed."""
        sequence_length(recipe.seqlen, self.source.longest)
        return self

    @property
    def weights(self) -> Sequence[Weight]:
        """What will be quantized."""
        return self.division.weights

    @property
    def kept(self) -> Mapping[str, str]:
        """The others, and why each of them is kept."""
        return {kept.tensor: kept.why for kept in self.division.kept}

    @cached_property
    def all_units(self) -> list[Unit]:
        """All tensors, in units."""
        return units(self.division, self.source.checkpoint)

    @property
    def as_stored(self) -> Sequence[str]:
        """Those of units in which nothing is quantized."""
        return [name for unit in self.all_units if not unit.weights for name in unit.copied]

    @property
    def units(self) -> Sequence[str]:
        """The units' names."""
        return [unit.name for unit in self.all_units]

    @property
    def blocks(self) -> int:
        """How many blocks the names number."""
        return len({block for unit in self.all_units if (block := block_of(f"{unit.block}.")) is not None})

    @property
    def kept_linears(self) -> Sequence[str]:
        """Linears of the model as transformers sees it; where it sees none, matrices that are kept, and lm_head."""
        if self.view is not None:
            quantized = {self.view.linear(weight.tensor) for weight in self.weights}
            head = {"lm_head"} if self.copied_head else set()
            return sorted(self.view.linears - quantized - head)
        quantized = {weight.name for weight in self.weights}
        entry = self.source.checkpoint.entry
        kept = [k.tensor for k in self.division.kept if len(entry(k.tensor).shape) == 2 and k.why != discover.EMBEDDING]
        return sorted({*(name.removesuffix(".weight") for name in kept), "lm_head"} - quantized)

    def only_ours(self, scheme: Scheme) -> str | None:
        """A weight that transformers cannot load from compressed-tensors (docs/formats/compressed-tensors.md).

        That of a linear with a class of its own; an expert in a stack, or, where transformers stacks them itself, one
        with a zero point or beside others that are not quantized.
        """
        stacked = [weight.name for weight in self.weights if weight.stacked]
        if stacked or self.view is None:
            return next(iter(stacked), None)
        merged = [weight.name for weight in self.weights if self.view.merges(weight.tensor)]
        modules = {w.name: self.view.linear(w.tensor) for w in self.weights}
        special = [name for name, module in modules.items() if module and module not in self.view.ordinary]
        kept = [k.tensor for k in self.division.kept if self.view.merges(k.tensor)]
        alone = [*merged, *kept] if kept or not scheme.weight.symmetric else []
        return next(iter([*special, *alone]), None)

    def budget(self, training: Training | None) -> Budget:
        """The memory that one worker needs."""
        return estimate_tensors(self.all_units, self.source.checkpoint)


def _known(source: Source, recipe: Recipe, device: str) -> tuple[ModelView, Division, bool]:
    """The linears of an architecture that is described."""
    assert source.family is not None
    outline = Outline.of(source.family, source.decoder) if source.decoder else skeleton_of(source, device).outline
    source.checkpoint.require_complete(outline)
    weights = outline.weights(recipe.quantize_lm_head)
    tied = recipe.quantize_lm_head and outline.tied
    view = ModelView.of_outline(outline, source.checkpoint)
    taken = {w.tensor for w in weights} - ({weights[-1].tensor} if tied else set())
    taken |= {f"{w.name}.weight" for w in weights}  # an output layer that is tied, and stored all the same
    reasons = {kept.tensor: kept.why for kept in _by_rules(source.checkpoint).kept}
    kept = [
        Kept(n, reasons.get(n, "no linear of this architecture")) for n in source.checkpoint.names if n not in taken
    ]
    return view, Division(tuple(weights), tuple(kept)), tied


def _discovered(checkpoint: Checkpoint, recipe: Recipe) -> tuple[ModelView | None, Division, bool]:
    """The linears of an architecture that nobody has described."""
    view, division = ModelView.of(checkpoint), _by_rules(checkpoint)
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
    kept = tuple(one for one in division.kept if one.tensor != head)
    return view, replace(division, weights=(*division.weights, weight), kept=kept), head is None


def _why_nothing(division: Division, checkpoint: Checkpoint) -> str:
    """What became of the matrices, a line for each reason."""
    matrices = [kept for kept in division.kept if len(checkpoint.entry(kept.tensor).shape) == 2]
    reasons: dict[str, list[str]] = {}
    for kept in matrices:
        reasons.setdefault(kept.why, []).append(kept.tensor)
    lines = [f"  {len(names)} such as {names[0]}: {why}" for why, names in reasons.items()]
    remedy = "--include takes more"
    if any(why.startswith("excluded") for why in reasons):
        remedy = "--exclude leaves nothing"
    elif reasons and reasons.keys() <= {discover.EMPTY, discover.UNNAMED}:
        remedy = "none of them can be the weight of a linear"
    return "\n".join([f"all of its {len(matrices)} matrices are kept as they are", *lines, remedy])


def _by_rules(checkpoint: Checkpoint) -> Division:
    entries = {name: checkpoint.entry(name) for name in checkpoint.names}
    floating = [name for name, entry in entries.items() if entry.dtype.is_floating_point]
    return discover.discover({name: entry.shape for name, entry in entries.items()}, floating, checkpoint.config)
