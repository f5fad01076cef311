"""The question of a recipe that names engines: which formats run the workload there, and which take the model.

The table of engines (``core/engine.py``) answers the first half; the names and shapes of the model's tensors answer the
second. No weight is read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bitwright.core.configuration import Configuration
from bitwright.core.engine import Engine, Way, Workload
from bitwright.core.errors import RecipeError, SchemeError
from bitwright.core.mixing import Schemes
from bitwright.core.recipe import Recipe
from bitwright.core.scheme import Scheme
from bitwright.methods import composed_for
from bitwright.model.source import open_checkpoint, require_folder
from bitwright.prepare.checks import check_shapes
from bitwright.prepare.format_choice import WIDELY_LOADED, not_widely_loaded, target
from bitwright.prepare.work import Work, opened


@dataclass(frozen=True)
class ModelLimits:
    """The model of a recipe, opened when it is first asked."""

    recipe: Recipe
    device: str

    @property
    def name(self) -> str:
        """The model as the recipe names it."""
        return self.recipe.model

    @cached_property
    def work(self) -> Work:
        """The linears that would be quantized. Raises UserError if the model cannot be quantized at all."""
        # Whether a tokenizer is needed, the format says.
        return opened(self.recipe, composed_for(self.recipe), self.device, tokenizer=False)[1]

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Sizes [O, I] of the linears, without those of experts."""
        return {
            weight.name: weight.slice[::-1] if weight.transposed else weight.slice
            for weight in self.work.weights
            if not (weight.stacked or "experts" in weight.name.split("."))
        }

    def schemes(self, workload: Workload) -> Schemes:
        """The scheme of every linear; None is one that is left in full precision."""
        quantized = {weight.name: workload.scheme for weight in self.work.weights}
        return {**quantized, **dict.fromkeys(self.work.kept_linears), **workload.exceptions}

    def obstacle(self, scheme: Scheme, format: str, ways: Sequence[Way]) -> str | None:
        """What keeps this model out of a format under a scheme, or from running in one of these ways; None if nothing.

        The words are without the advice of ``prepare``, which an engine may not run.
        """
        try:
            check_shapes(self.work, scheme, [scheme.tile], target(format), advise=False)
        except (SchemeError, RecipeError) as error:
            return str(error)
        only_ours = self.work.only_ours(scheme) if format == WIDELY_LOADED else None
        if only_ours is not None:
            return not_widely_loaded(only_ours)
        return next((why for way in ways if (why := way.refuses_sizes(self.linears)) is not None), None)


@dataclass(frozen=True)
class Question:
    """Whether one engine or several run this workload with this model; ``named`` is the recipe's format, if any."""

    workload: Workload
    model: ModelLimits
    named: str | None

    @classmethod
    def of(cls, recipe: Recipe, device: str, workload: Workload | None) -> "Question":
        """Read the question from a recipe. Raises UserError for a model, scheme, method or settings that are none."""
        return cls(workload or _parsed(recipe), ModelLimits(recipe, device), recipe.format)

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
                yield format, self.model.obstacle(self.workload.scheme, format, loading)


def formats_of(ways: Sequence[Way]) -> list[str]:
    """The formats of these ways, each once."""
    return list(dict.fromkeys(way.format for way in ways))


def workload_of(model_type: str, configuration: Configuration) -> Workload:
    """What an engine sees of a model that these methods quantize."""
    freedoms = configuration.freedoms()
    outliers = any(freedom.outliers is not None for freedom in freedoms)
    return Workload(configuration.scheme, model_type, outliers, [t for freedom in freedoms for t in freedom.tiles])


def _parsed(recipe: Recipe) -> Workload:
    require_folder(Path(recipe.model))
    model_type = str(open_checkpoint(Path(recipe.model)).config.get("model_type"))
    scheme, composition = Scheme.parse(recipe.scheme), composed_for(recipe)
    return workload_of(model_type, composition.settled(recipe.training, scheme, recipe.settings))
