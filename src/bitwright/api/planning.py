"""The plan of what running a recipe will do."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

from bitwright.api.crew import crew_of
from bitwright.api.engine_choice import for_engines
from bitwright.api.format_choice import HOLDS_ALL, WIDELY_LOADED, on_the_way
from bitwright.api.job import Job, prepare
from bitwright.api.source import architecture
from bitwright.api.tensor_kinds import TensorKind, tensors_of
from bitwright.api.tensor_work import TensorWork
from bitwright.api.work import foreseen
from bitwright.core.decisions import Decision
from bitwright.core.qtensor import packed_bits
from bitwright.core.recipe import Recipe
from bitwright.core.scheme import Scheme
from bitwright.core.weight import Weight
from bitwright.methods import learned
from bitwright.stream.budget import Budget
from bitwright.stream.ranks import Ranks


@dataclass(frozen=True)
class Plan:
    """What a run will do: sizes in bytes, tokens as counted. ``memory`` is of one process, ``memory_bytes`` of all."""

    model: str
    architecture: str
    method: str
    scheme: str
    format: str
    blocks: int
    linears: int
    quantized_weights: int
    bits_per_weight: float
    bytes_in: int
    bytes_out: int
    memory: Budget
    memory_bytes: int
    workers: int
    calibration_tokens: int
    tensors: tuple[TensorKind, ...]
    notes: tuple[str, ...]


def plan(recipe: Recipe, device: str = "auto", workers: int | None = None, max_memory: str | None = None) -> Plan:
    """What ``quantize`` would do with this recipe; reads no weight and writes nothing."""
    with Ranks.here().alike():
        job = prepare(for_engines(recipe, device), device)
        crew = crew_of(job, workers, max_memory)
    found = replace(plan_of(job), workers=crew.workers, memory_bytes=crew.memory_bytes)
    if job.settings.outlier_rule is None or not any(Decision.OUTLIERS in method.decides for method in job.methods):
        return found
    note = f"outliers ({job.settings.outliers}) come on top of these bits and bytes, some 48 bits each"
    return replace(found, notes=(*found.notes, note))


def plan_of(job: Job) -> Plan:
    """The plan of a job that is ready."""
    checkpoint, dtype, work = job.source.checkpoint, job.scales, job.work
    kept = sum(checkpoint.nbytes(name) for name in foreseen(job.source, work, job.scheme).passed)
    quantized = sum(job.target.stored_bytes(w.shape, _scheme(job, w), dtype) for w in work.weights)
    count = sum(prod(weight.shape) for weight in work.weights)
    bits = sum(w.slices * packed_bits(w.slice, job.scheme.weight, w.tile(job.scheme.tile), dtype) for w in work.weights)
    budget = work.budget(job.settings, learned(job.methods))
    return Plan(
        model=job.recipe.model,
        architecture=architecture(checkpoint.config),
        method=job.method,
        scheme=str(job.scheme),
        format=job.expected,
        blocks=work.blocks,
        linears=len(work.weights),
        quantized_weights=count,
        bits_per_weight=bits / count,
        bytes_in=checkpoint.total_bytes,
        bytes_out=kept + quantized,
        memory=budget,
        memory_bytes=budget.total,
        workers=1,
        calibration_tokens=0 if job.tokens is None else job.tokens.numel(),
        tensors=tensors_of(job),
        notes=tuple(_notes(job)),
    )


def _scheme(job: Job, weight: Weight) -> Scheme:
    return replace(job.scheme, tile=weight.tile(job.scheme.tile))


def _notes(job: Job) -> Iterator[str]:
    if job.note is not None:
        yield job.note
    left_out = job.left_out(on_the_way(job.recipe.format) or WIDELY_LOADED)
    if left_out is not None and job.expected != HOLDS_ALL:
        yield left_out
    if job.recipe.quantize_lm_head and any(method.needs_text for method in job.methods):
        yield f"the output layer gets min-max ranges, rounded to nearest: {job.method} works on the blocks"
    if (alone := _keep_their_groups(job)) is not None:
        yield alone
    if job.work.copied_head:
        yield "the output layer is tied to the embedding: it is quantized as a copy of its own, the embedding stays"
    if job.tokens is not None and not any(method.needs_text for method in job.methods):
        yield f"{job.method} needs no calibration text; it is used to report output errors"


def _keep_their_groups(job: Job) -> str | None:
    """Which weights --axis is not for."""
    axis = job.settings.axis
    if axis in (None, "oc") or not isinstance(job.work, TensorWork):
        return None
    names = [weight.name for weight in job.work.weights if not weight.takes_axis(axis)]
    if not names:
        return None
    return (
        f"--axis {axis} is for linears of their own, stored [out, in]: {len(names)} keep the groups of the scheme, as "
        f"{names[0]} does"
    )
