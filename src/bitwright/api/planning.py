"""plan(): say what ``quantize`` would do with a recipe."""

from bitwright.core.recipe import Recipe
from bitwright.prepare.engine_choice import for_engines
from bitwright.prepare.plan import Plan, plan_of
from bitwright.prepare.prepared import prepare
from bitwright.prepare.question import Question
from bitwright.prepare.resources import workers_for
from bitwright.stream.ranks import Ranks


def plan(recipe: Recipe, device: str = "auto", workers: int | None = None, max_memory: str | None = None) -> Plan:
    """Plan a run of ``quantize``; this reads no weight and writes nothing. Raises UserError."""
    with Ranks.here().alike():
        question = Question.of(recipe)
        run = prepare(question if recipe.engines is None else for_engines(question, device), device)
        return plan_of(run, workers_for(run, workers, max_memory, Ranks()))
