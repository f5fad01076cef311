"""plan(): what ``quantize`` would do with a recipe."""

from dataclasses import replace

from bitwright.core.recipe import Recipe
from bitwright.prepare.crew import crew_of
from bitwright.prepare.engine_choice import for_engines
from bitwright.prepare.job import prepare
from bitwright.prepare.plan import Plan, plan_of
from bitwright.stream.ranks import Ranks


def plan(recipe: Recipe, device: str = "auto", workers: int | None = None, max_memory: str | None = None) -> Plan:
    """What ``quantize`` would do with this recipe; reads no weight and writes nothing."""
    with Ranks.here().alike():
        job = prepare(for_engines(recipe, device), device)
        crew = crew_of(job, workers, max_memory)
    found = replace(plan_of(job), workers=crew.workers, memory_bytes=crew.memory_bytes)
    rule = next((freedom.outliers for freedom in job.configuration.freedoms() if freedom.outliers is not None), None)
    if rule is None:
        return found
    note = f"outliers ({rule}) come on top of these bits and bytes, some 48 bits each"
    return replace(found, notes=(*found.notes, note))
