"""The plan of what running a recipe will do."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from bitwright.api.format_choice import HOLDS_ALL, WIDELY_LOADED
from bitwright.api.job import Job, prepare
from bitwright.api.source import architecture
from bitwright.core.decisions import Decision
from bitwright.core.qtensor import packed_bits
from bitwright.core.recipe import Recipe
from bitwright.methods import learned
from bitwright.stream.budget import Budget, estimate


@dataclass(frozen=True)
class Plan:
    """What a run will do: sizes in bytes, tokens as counted."""

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
    calibration_tokens: int
    notes: tuple[str, ...]


def plan(recipe: Recipe, device: str = "auto") -> Plan:
    """What ``quantize`` would do with this recipe; reads no weight and writes nothing."""
    job = prepare(recipe, device)
    found = plan_of(job)
    if job.settings.outlier_rule is None or not any(Decision.OUTLIERS in method.decides for method in job.methods):
        return found
    note = f"outliers ({job.settings.outliers}) come on top of these bits and bytes, some 48 bits each"
    return replace(found, notes=(*found.notes, note))


def plan_of(job: Job) -> Plan:
    """The plan of a job that is ready."""
    checkpoint, dtype = job.source.checkpoint, job.source.checkpoint.dtype_of_weights
    shapes = dict(job.linears())
    replaced = {f"{name}.weight" for name in shapes}  # a tied output layer that is quantized leaves the embedding
    kept = sum(checkpoint.nbytes(name) for name in checkpoint.names if name not in replaced)
    quantized = sum(job.format.stored_bytes(shape, job.scheme, dtype) for shape in shapes.values())
    weights = sum(rows * columns for rows, columns in shapes.values())
    bits = sum(packed_bits(shape, job.scheme.weight, job.scheme.tile, dtype) for shape in shapes.values())
    tokens = 0 if job.tokens is None else job.tokens.numel()
    trained = job.tokens is not None and learned(job.methods)
    step = (
        min(job.settings.batch_size, len(job.tokens)) * job.tokens.shape[1] if trained and job.tokens is not None else 0
    )
    budget = estimate(job.skeleton, tokens, step, job.settings.aug_loss)
    return Plan(
        model=job.recipe.model,
        architecture=architecture(checkpoint.config),
        method=job.method,
        scheme=str(job.scheme),
        format=job.expected,
        blocks=len(job.skeleton.block_names),
        linears=len(shapes),
        quantized_weights=weights,
        bits_per_weight=bits / weights,
        bytes_in=checkpoint.total_bytes,
        bytes_out=kept + quantized,
        memory=budget,
        memory_bytes=budget.total,
        calibration_tokens=tokens,
        notes=tuple(_notes(job)),
    )


def _notes(job: Job) -> Iterator[str]:
    if job.note is not None:
        yield job.note
    left_out = job.left_out(job.recipe.format or WIDELY_LOADED)
    if left_out is not None and job.expected != HOLDS_ALL:
        yield left_out
    if job.recipe.quantize_lm_head and any(method.needs_text for method in job.methods):
        yield f"the output layer gets min-max ranges, rounded to nearest: {job.method} works on the blocks"
    if job.recipe.quantize_lm_head and job.skeleton.tied:
        yield "the output layer is tied to the embedding: it is quantized as a copy of its own, the embedding stays"
    if job.tokens is not None and not any(method.needs_text for method in job.methods):
        yield f"{job.method} needs no calibration text; it is used to report output errors"
