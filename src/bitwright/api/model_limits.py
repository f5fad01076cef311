"""What a model's own sizes and experts allow of schemes and formats, told from headers and names."""

from dataclasses import dataclass
from functools import cached_property

from bitwright.api.checks import check_shapes
from bitwright.api.format_choice import WIDELY_LOADED, not_widely_loaded, target
from bitwright.api.work import Work, opened
from bitwright.core.errors import RecipeError, SchemeError
from bitwright.core.recipe import Recipe
from bitwright.core.scheme import Scheme


@dataclass(frozen=True)
class ModelLimits:
    """The model of a recipe, opened when it is first asked."""

    recipe: Recipe
    device: str

    @cached_property
    def work(self) -> Work:
        """The linears that would be quantized. Raises UserError where the model cannot be at all."""
        return opened(self.recipe, self.device)[1]

    def refuse(self, scheme: Scheme, format: str) -> str | None:
        """Why linears of this model have no place in a format under a scheme, as ``prepare`` will say; None where they
        all have."""
        try:
            check_shapes(self.work, scheme, [scheme.tile], target(format))
        except (SchemeError, RecipeError) as error:
            return str(error)
        ours = self.work.only_ours(scheme) if format == WIDELY_LOADED else None
        return None if ours is None else not_widely_loaded(ours)
