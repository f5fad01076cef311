"""What a model's own sizes and experts allow of schemes, formats and engines, told from headers and names."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from bitwright.core.engine import Way
from bitwright.core.errors import RecipeError, SchemeError
from bitwright.core.recipe import Recipe
from bitwright.core.scheme import Scheme
from bitwright.prepare.checks import check_shapes
from bitwright.prepare.format_choice import WIDELY_LOADED, not_widely_loaded, target
from bitwright.prepare.work import Work, opened


@dataclass(frozen=True)
class ModelLimits:
    """The model of a recipe, opened when it is first asked."""

    recipe: Recipe
    device: str

    @cached_property
    def work(self) -> Work:
        """The linears that would be quantized. Raises UserError where the model cannot be at all."""
        return opened(self.recipe, self.device, tokenizer=False)[1]  # whether it needs one, the format says

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Sizes [O, I] of the linears, those of experts left out."""
        return {
            weight.name: weight.slice[::-1] if weight.transposed else weight.slice
            for weight in self.work.weights
            if not (weight.stacked or "experts" in weight.name.split("."))
        }

    def refuse(self, scheme: Scheme, format: str, ways: Iterable[Way] = ()) -> str | None:
        """Why linears of this model have no place in a format under a scheme, without what ``prepare`` would advise,
        since an engine may not run that; or do not run in one of these ways. None where they all have one and do."""
        try:
            check_shapes(self.work, scheme, [scheme.tile], target(format), advise=False)
        except (SchemeError, RecipeError) as error:
            return str(error)
        ours = self.work.only_ours(scheme) if format == WIDELY_LOADED else None
        if ours is not None:
            return not_widely_loaded(ours)
        return next((why for way in ways if (why := way.refuses_sizes(self.linears)) is not None), None)
