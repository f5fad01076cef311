"""What a recipe asks for, parsed once, before any model is looked at."""

from dataclasses import dataclass, replace
from pathlib import Path

from bitwright.core.errors import RecipeError, shown
from bitwright.core.format import FileFormat, Format, TensorFormat
from bitwright.core.recipe import Recipe
from bitwright.core.scheme import Scheme
from bitwright.methods import Composition, composed_for
from bitwright.prepare.allocation_rules import AllocationRules
from bitwright.prepare.format_choice import HOLDS_ALL, WIDELY_LOADED, encoder, target


@dataclass(frozen=True)
class Question:
    """A recipe, parsed.

    ``target`` is the format of the result as far as the recipe says; ``format`` makes the tensors, which is another one
    if the target is an engine's file, made of a finished folder. ``rules`` say which linears get a scheme of their own.
    """

    recipe: Recipe
    scheme: Scheme
    composition: Composition
    target: Format
    format: TensorFormat
    rules: AllocationRules

    @classmethod
    def of(cls, recipe: Recipe) -> "Question":
        """Parse a recipe. Raises UserError for a scheme, method, format or allocation file that is none."""
        if not isinstance(recipe, Recipe):
            raise RecipeError(
                f"a Recipe was expected, found {shown(recipe)}; write bitwright.quantize("
                f"bitwright.Recipe(model={_model_in(recipe)}, scheme='W4A16g128'), OUTPUT)"
            )
        goal, makes = target(recipe.format), encoder(recipe.format)
        rules = AllocationRules.of(recipe)
        question = cls(recipe, rules.default, composed_for(recipe), goal, makes, rules)
        question._refuse_activations()
        return replace(question, scheme=question.adapted(rules.default))

    @property
    def alone(self) -> bool:
        """Whether every tensor can be quantized by itself: no calibration data, and methods that need none."""
        return self.recipe.calibration is None and self.composition.data_free

    @property
    def single(self) -> bool:
        """Whether the result is one file."""
        return isinstance(self.target, FileFormat) and self.target.single

    @property
    def needs_tokenizer(self) -> bool:
        """Whether the model's folder must have a tokenizer.

        It need not if the result takes that of its base, and no calibration data are read.
        """
        return self.recipe.calibration is not None or self.recipe.base is None or not self.single

    def adapted(self, scheme: Scheme) -> Scheme:
        """A scheme on the grid that the target's codes are computed against."""
        return self.target.adapted(scheme) if isinstance(self.target, FileFormat) else scheme

    def _refuse_activations(self) -> None:
        """Raise RecipeError for quantized activations if the target has a place for weights alone."""
        scheme = self.scheme
        if self.target.weights_only and (scheme.activations or scheme.kv):
            raise RecipeError(
                f"format {self.target.name} cannot hold the activations or KV cache of scheme {scheme}; use format "
                f"{WIDELY_LOADED} or {HOLDS_ALL}, or a scheme with A16"
            )


def _model_in(value: object) -> str:
    """The model that somebody may have meant by a value in place of a recipe."""
    return shown(str(value)) if isinstance(value, str | Path) else "'MODEL'"
