"""The plan: what running a recipe will do, in sizes, bits and memory, and what happens to every tensor."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from bitwright.core.qtensor import packed_bits
from bitwright.core.scheme import Scheme
from bitwright.core.weight import Weight, starred
from bitwright.model.config import architecture
from bitwright.prepare.format_choice import HOLDS_ALL, WIDELY_LOADED, on_the_way
from bitwright.prepare.job import Job
from bitwright.prepare.tensor_work import TensorWork
from bitwright.prepare.work import foreseen
from bitwright.stream.memory import Budget


@dataclass(frozen=True)
class TensorKind:
    """``count`` tensors of one shape whose names differ where ``name`` has ``*``; ``why`` is empty for what is
    quantized, and says why another is kept."""

    name: str
    shape: tuple[int, ...]
    count: int
    quantized: bool
    why: str


@dataclass(frozen=True)
class Plan:
    """What a run will do: sizes in bytes, tokens as counted. ``memory`` is of one process, ``memory_bytes`` of all.

    ``settings`` are those of the methods, preset and recipe together.
    """

    model: str
    architecture: str
    method: str
    scheme: str
    format: str
    settings: Mapping[str, Any]
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


def plan_of(job: Job) -> Plan:
    """The plan of a job that is ready."""
    checkpoint, dtype, work = job.source.checkpoint, job.scales, job.work
    kept = sum(checkpoint.nbytes(name) for name in foreseen(job.source, work, job.scheme).passed)
    quantized = sum(job.target.stored_bytes(w.shape, _scheme(job, w), dtype) for w in work.weights)
    count = sum(prod(weight.shape) for weight in work.weights)
    bits = sum(w.slices * packed_bits(w.slice, job.scheme.weight, w.tile(job.scheme.tile), dtype) for w in work.weights)
    budget = work.budget(job.configuration.training)
    return Plan(
        model=job.recipe.model,
        architecture=architecture(checkpoint.config),
        method=job.method,
        scheme=str(job.scheme),
        format=job.expected,
        settings=job.configuration.values(),
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
    if job.recipe.quantize_lm_head and job.configuration.needs_text:
        yield f"the output layer gets min-max ranges, rounded to nearest: {job.method} works on the blocks"
    if (alone := _keep_their_groups(job)) is not None:
        yield alone
    if job.work.copied_head:
        yield "the output layer is tied to the embedding: it is quantized as a copy of its own, the embedding stays"
    if job.tokens is not None and not job.configuration.needs_text:
        yield f"{job.method} needs no calibration text; it is used to report output errors"


def _keep_their_groups(job: Job) -> str | None:
    """Which weights --axis is not for."""
    choosing = [freedom for freedom in job.configuration.freedoms() if freedom.tiles]
    if not choosing or not isinstance(job.work, TensorWork):
        return None
    compared = choosing[0].compared
    names = [weight.name for weight in job.work.weights if not weight.takes_tiles(compared)]
    if not names:
        return None
    return (
        f"--axis {'auto' if compared else 'ic'} is for linears of their own, stored [out, in]: {len(names)} keep the "
        f"groups of the scheme, as {names[0]} does"
    )


def tensors_of(job: Job) -> tuple[TensorKind, ...]:
    """Every tensor of the checkpoint that a job reads, quantized ones first."""
    weights = {weight.tensor: _said(weight) for weight in job.work.weights}
    kept = {name: why for name, why in job.work.kept.items() if name not in weights or job.work.copied_head}
    entry = job.source.checkpoint.entry
    counted = Counter((starred(name), entry(name).shape, True, said) for name, said in weights.items())
    counted.update((starred(name), entry(name).shape, False, why) for name, why in kept.items())
    return tuple(TensorKind(name, shape, count, done, why) for (name, shape, done, why), count in counted.items())


def _said(weight: Weight) -> str:
    if not weight.stacked:
        return ""
    return f"{weight.slices} experts, stored {'[in, out]' if weight.transposed else '[out, in]'}"
