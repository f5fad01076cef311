"""The question of a recipe that names engines: which formats run the workload there, and which take the model.

The table of engines (``core/engine.py``) answers the first half; the names and shapes of the model's tensors answer the
second. No weight is read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bitwright.core.engine import Engine, Way, Workload
from bitwright.core.errors import RecipeError, SchemeError
from bitwright.core.mixing import Schemes
from bitwright.core.scheme import Allocation
from bitwright.model.source import open_checkpoint
from bitwright.prepare.checks import check_shapes
from bitwright.prepare.format_choice import WIDELY_LOADED, not_widely_loaded, target
from bitwright.prepare.prepared import opened
from bitwright.prepare.question import Question
from bitwright.prepare.way import Inventory


@dataclass(frozen=True)
class ModelLimits:
    """The model of a recipe, opened when it is first asked."""

    question: Question
    device: str

    @property
    def name(self) -> str:
        """The model as the recipe names it."""
        return self.question.recipe.model

    @cached_property
    def inventory(self) -> Inventory:
        """The linears that would be quantized. Raises UserError if the model cannot be quantized at all."""
        return opened(self.question, self.device, tokenizer=False)[1].inventory  # only names and shapes are asked

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Sizes [O, I] of the linears, without those of experts."""
        return {
            weight.name: weight.slice[::-1] if weight.transposed else weight.slice
            for weight in self.inventory.weights
            if not (weight.stacked or "experts" in weight.name.split("."))
        }

    def schemes(self, workload: Workload) -> Schemes:
        """The scheme of every linear, None for those left in full precision."""
        quantized = {weight.name: workload.scheme for weight in self.inventory.weights}
        return {**quantized, **dict.fromkeys(self.inventory.kept_linears), **workload.exceptions}

    def obstacle(self, workload: Workload, format: str, ways: Sequence[Way]) -> str | None:
        """Say why this model cannot be written in a format with a workload's schemes, or not run in one of these ways.

        None if it can. The errors of ``prepare`` advise other schemes; that advice is left out here, because the engine
        may not run those schemes.
        """
        rules = self.question.rules
        asked = {name: text for name in workload.exceptions if (text := rules.asked_for(name)) is not None}
        allocation = Allocation(workload.scheme, workload.exceptions, asked)
        try:
            check_shapes(self.inventory, allocation, lambda scheme: [scheme.tile], target(format), advise=False)
        except (SchemeError, RecipeError) as error:
            return str(error)
        only_ours = self.inventory.only_ours(allocation) if format == WIDELY_LOADED else None
        if only_ours is not None:
            return not_widely_loaded(only_ours)
        return next((why for way in ways if (why := way.refuses_sizes(self.linears)) is not None), None)


@dataclass(frozen=True)
class EngineQuestion:
    """Whether one engine or several run this workload with this model; ``named`` is the recipe's format, if any."""

    workload: Workload
    model: ModelLimits
    named: str | None

    @classmethod
    def of(cls, question: Question, device: str) -> "EngineQuestion":
        """What a recipe asks of engines. Raises UserError for a model, scheme, method or settings that are none."""
        limits = ModelLimits(question, device)
        return cls(_workload(question, limits), limits, question.recipe.format)

    def ways(self, engine: Engine) -> list[Way]:
        """The ways to an engine, those of the named format if there is one."""
        return [way for way in engine.ways if self.named in (None, way.format)]

    def running(self, engine: Engine) -> list[Way]:
        """The ways in which an engine runs every scheme of the workload."""
        return [way for way in self.ways(engine) if not any(map(way.refusal, self.workload.uniform()))]

    def obstacles(self, ways: Sequence[Sequence[Way]]) -> Iterator[tuple[str, str | None]]:
        """The formats that all engines share, the first engine's best first, and what keeps the model out of them.

        ``ways`` are those of each engine. The obstacle is None if the model goes into the format.
        """
        for format in formats_of(ways[0]):
            if all(format in formats_of(of_engine) for of_engine in ways):
                loading = [way for of_engine in ways for way in of_engine if way.format == format]
                yield format, self.model.obstacle(self.workload, format, loading)


def formats_of(ways: Sequence[Way]) -> list[str]:
    """The formats of these ways, each once."""
    return list(dict.fromkeys(way.format for way in ways))


def _workload(question: Question, limits: ModelLimits) -> Workload:
    """What an engine sees of the model that a recipe makes."""
    model_type = str(open_checkpoint(Path(question.recipe.model)).config.get("model_type"))
    allocation = limits.inventory.allocation(question) if question.rules.mixed else Allocation(question.rules.default)
    scheme = allocation.default
    settled = question.composition.settled(question.recipe.training, scheme, question.recipe.settings)
    freedoms = settled.freedoms(scheme)
    outliers = any(freedom.outliers is not None for freedom in freedoms)
    tiles = [tile for freedom in freedoms for tile in freedom.tiles]
    return Workload(scheme, model_type, outliers, tiles, allocation.own)
