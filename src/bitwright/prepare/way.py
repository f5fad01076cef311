"""The two ways to go through a model, block by block or tensor by tensor, behind one interface (``Way``)."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from bitwright.calibration.segments import Segments
from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.block import Family, Topology
from bitwright.core.format import Foreseen
from bitwright.core.progress import Listener
from bitwright.core.scheme import Allocation
from bitwright.core.training import Training
from bitwright.core.weight import Division, Weight
from bitwright.model import discover
from bitwright.model.view import ModelView
from bitwright.prepare.question import Question
from bitwright.stream.memory import Budget
from bitwright.stream.parts import Driver, PartWriter
from bitwright.stream.ranks import Ranks
from bitwright.stream.run_plan import RunPlan
from bitwright.stream.worker_pool import WorkerPool

HEAD = "lm_head"


@dataclass(frozen=True)
class Inventory:
    """The tensors of a checkpoint as a run will treat them, told from names, shapes and dtypes.

    ``weights`` are what will be quantized, in the order of the model; ``kept`` the tensors that stay as they are, and
    why; ``kept_linears`` the linears among them, by their names in the model. ``as_stored`` are the tensors that are in
    no part: they are copied from the checkpoint at the end. ``units`` are the names of what is written part by part,
    in the order of the model; ``blocks`` is the number of decoder blocks. ``copied_head``: an output layer that shares
    its weight with the embedding gets a weight of its own.

    ``family`` is what formats ask about an architecture whose activations are quantized, None if it is not known;
    ``topology`` is that of a block with the most sites, None if blocks were not looked into. ``special`` is the
    first weight that transformers can load only with our plugin, whatever its codes are, such as a stack of
    experts. ``merged`` is the first expert that transformers stacks itself: without our plugin it loads such a
    weight only if it is symmetric. Each is None if there is no such weight.
    """

    weights: Sequence[Weight]
    kept: Mapping[str, str]
    kept_linears: Sequence[str]
    as_stored: Sequence[str]
    units: Sequence[str]
    blocks: int
    copied_head: bool
    family: Family | None = None
    topology: Topology | None = None
    special: str | None = None
    merged: str | None = None

    @property
    def linears(self) -> tuple[str, ...]:
        """The names of the linears that will be quantized."""
        return tuple(weight.name for weight in self.weights)

    def allocation(self, question: Question) -> Allocation:
        """The scheme of every linear. Raises RecipeError as ``AllocationRules.allocation``."""
        others = (name.removesuffix(".weight") for name in self.kept)
        asked = question.rules.allocation(self.linears, self.kept_linears, others)
        default = question.adapted(asked.default)
        adapted = {name: scheme and question.adapted(scheme) for name, scheme in asked.schemes.items()}
        unlike = {name: scheme for name, scheme in adapted.items() if scheme != default}
        return Allocation(default, unlike, asked.asked)

    def only_ours(self, allocation: Allocation) -> str | None:
        """A weight that transformers loads only with our plugin; None if there is none."""
        symmetric = all(scheme.weight.symmetric for scheme in allocation.distinct)
        return self.special or (None if symmetric else self.merged)

    def left_alone(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, float]:
        """The share of the weights of all matrices that stays as it is, by the reason, the largest first.

        ``shapes`` are those of all floating tensors of the checkpoint; experts in one tensor count as matrices.
        """
        reasons = Counter[str]()
        for name, why in self.kept.items():
            shape = shapes.get(name, ())
            if len(shape) == 2 or (len(shape) == 3 and min(shape[1:]) > 1):
                reasons[why] += prod(shape)
        total = reasons.total() + sum(prod(weight.shape) for weight in self.weights)
        return {why: count / total for why, count in reasons.most_common() if count}

    def foreseen(self, names: Iterable[str], allocation: Allocation) -> Foreseen:
        """The quantized model as far as names and shapes tell; ``names`` are all tensors of the checkpoint."""
        linears = {weight.name: weight.shape for weight in self.weights}
        passed = [name for name in names if name.removesuffix(".weight") not in linears]
        return Foreseen(linears, passed, allocation.default.weight, allocation.default.tile)


def kept_linears(division: Division, view: ModelView | None, checkpoint: Checkpoint, copied_head: bool) -> list[str]:
    """Linears of the model as transformers sees it; if it sees none, matrices that are kept, and the output layer."""
    if view is not None:
        quantized = {view.linear(weight.tensor) for weight in division.weights}
        placed = sorted(view.linears - quantized - ({HEAD} if copied_head else set()))
        return [*placed, *_nowhere(division, view, checkpoint)]
    names = {weight.name for weight in division.weights}
    entry = checkpoint.entry
    kept = [k.tensor for k in division.kept if len(entry(k.tensor).shape) == 2 and k.why != discover.EMBEDDING]
    return sorted({*(name.removesuffix(".weight") for name in kept), HEAD} - names)


def _nowhere(division: Division, view: ModelView, checkpoint: Checkpoint) -> list[str]:
    """Matrices that are kept and that transformers passes over: engines make linears of them (``mtp.*``)."""
    kept = [k.tensor for k in division.kept if k.tensor.endswith(".weight") and k.why != discover.EMBEDDING]
    nowhere = (name for name in kept if view.shapes and view.places.get(name, name) not in view.shapes)
    return [name.removesuffix(".weight") for name in nowhere if len(checkpoint.entry(name).shape) == 2]


def loaded_by_us(division: Division, view: ModelView | None) -> tuple[str | None, str | None]:
    """A weight that transformers cannot load from compressed-tensors, and one that it cannot if it is asymmetric.

    That is the weight of a linear with a class of its own; an expert in a stack, or, if transformers stacks them
    itself, one with a zero point or beside others that are not quantized (docs/formats/compressed-tensors.md).
    """
    special = [weight.name for weight in division.weights if weight.stacked or weight.transposed]
    if special or view is None:
        return next(iter(special), None), None
    tensors = {weight.name: weight.tensor for weight in division.weights}
    return view.needing_plugin(tensors, (kept.tensor for kept in division.kept))


class Way(Protocol):
    """``BlockWay`` or ``TensorWay``."""

    @property
    def inventory(self) -> Inventory:
        """The model's tensors."""

    @property
    def device(self) -> torch.device:
        """The device of the arithmetic."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic."""

    @property
    def shares_out(self) -> bool:
        """Whether several processes can share the work."""

    def read_calibration(self, question: Question, say: Callable[[str], None]) -> Segments | None:
        """The calibration segments, None if no calibration data are named; ``say`` notes what a user should know.

        Raises UserError.
        """

    def budget(self, tokens: Int[Tensor, "N T"] | None, training: Training | None) -> Budget:
        """The memory that one process needs."""

    def check_weights(self, listener: Listener) -> str:
        """Look for weights that are no numbers, if hours of work follow. Raises CheckpointError.

        The text tells these weights from others: a run goes on only if it is still the same.
        """

    def driver(
        self,
        plan: RunPlan,
        writer: PartWriter,
        tokens: Int[Tensor, "N T"] | None,
        workers: int,
        pool: WorkerPool | None,
        ranks: Ranks,
    ) -> Driver:
        """What makes the parts."""
