"""Worker processes that are started at once, while this one still imports what it needs; imports nothing heavy."""

from bitwright.core.recipe import Recipe
from bitwright.stream.hands import Hands


def hired(recipe: Recipe, workers: int | None) -> Hands:
    """As many as were asked for, where a recipe names no text; else none before more is known."""
    return Hands(workers if workers is not None and workers > 1 and recipe.calibration is None else 0)
