"""The plan: what running a recipe will do, in sizes, bits and memory, and what happens to every tensor."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from bitwright.core.weight import Weight, starred
from bitwright.model.config import architecture
from bitwright.prepare.format_choice import HOLDS_ALL, WIDELY_LOADED, encoder, target
from bitwright.prepare.prepared import Prepared
from bitwright.prepare.resources import Workers
from bitwright.stream.memory import Budget


@dataclass(frozen=True)
class TensorKind:
    """Tensors of one shape and alike in name.

    There are ``count`` of them; their names differ where ``name`` has ``*``. ``why`` is empty for what is quantized,
    and says why another is kept.
    """

    name: str
    shape: tuple[int, ...]
    count: int
    quantized: bool
    why: str


@dataclass(frozen=True)
class Plan:
    """What a run will do: sizes in bytes, tokens as counted. ``memory`` is of one process, ``memory_bytes`` of all.

    ``settings`` are those of the methods, preset and recipe together. ``begins_with`` is the token in front of every
    segment of the calibration data, None if the tokenizer puts none there.
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
    begins_with: str | None
    tensors: tuple[TensorKind, ...]
    notes: tuple[str, ...]


def plan_of(run: Prepared, workers: Workers) -> Plan:
    """The plan of a run that is ready."""
    weights = run.inventory.weights
    count = sum(prod(weight.shape) for weight in weights)
    bits = sum(run.target.stored_bits(weight.shape, run.scheme_of(weight), run.scales) for weight in weights)
    return Plan(
        model=run.recipe.model,
        architecture=architecture(run.source.checkpoint.config),
        method=run.method,
        scheme=str(run.scheme),
        format=run.expected,
        settings=run.configuration.values(),
        blocks=run.inventory.blocks,
        linears=len(weights),
        quantized_weights=count,
        bits_per_weight=bits / count,
        bytes_in=run.source.checkpoint.total_bytes,
        bytes_out=run.bytes_out,
        memory=run.way.budget(run.tokens, run.configuration.training),
        memory_bytes=workers.memory_bytes,
        workers=workers.count,
        calibration_tokens=0 if run.tokens is None else run.tokens.numel(),
        begins_with=None if run.segments is None else run.segments.begins_with,
        tensors=tensors_of(run),
        notes=(*notes_of(run, workers), *_outliers_on_top(run)),
    )


def notes_of(run: Prepared, workers: Workers) -> Iterator[str]:
    """What a user should know before the run."""
    if run.source.note is not None:
        yield run.source.note
    if workers.note is not None:
        yield workers.note
    if run.note is not None:
        yield run.note
    on_the_way = target(WIDELY_LOADED) if run.recipe.format is None else encoder(run.recipe.format)
    left_out = run.left_out(on_the_way)
    if left_out is not None and run.expected != HOLDS_ALL:
        yield left_out
    if run.recipe.quantize_lm_head and run.configuration.needs_text:
        yield f"the output layer gets min-max ranges, rounded to nearest: {run.method} works on the blocks"
    if (alone := _keep_their_groups(run)) is not None:
        yield alone
    if run.inventory.copied_head:
        yield "the output layer is tied to the embedding: it is quantized as a copy of its own, the embedding stays"
    if run.tokens is not None and not run.configuration.needs_text:
        yield f"{run.method} needs no calibration data; they are used to report output errors"
    if (note := run.allocated_in_part) is not None:
        yield note
    if own := run.allocation.own:
        counted = Counter(map(str, own.values()))
        yield "schemes of their own: " + ", ".join(
            f"{scheme} for {n} linear{'s' if n > 1 else ''}" for scheme, n in counted.items()
        )


def _outliers_on_top(run: Prepared) -> Iterator[str]:
    rules = (freedom.outliers for freedom in run.configuration.freedoms())
    rule = next((rule for rule in rules if rule is not None), None)
    if rule is not None:
        yield f"outliers ({rule}) come on top of these bits and bytes, some 48 bits each"


def _keep_their_groups(run: Prepared) -> str | None:
    """The weights that --axis is not for."""
    choosing = [freedom for freedom in run.configuration.freedoms() if freedom.tiles]
    weights = run.inventory.weights if choosing else ()
    names = [weight.name for weight in weights if not weight.takes_tiles(choosing[0].compared)]
    if not names:
        return None
    axis = "auto" if choosing[0].compared else "ic"
    return (
        f"--axis {axis} is for linears of their own, stored [out, in]: {len(names)} keep the "
        f"groups of the scheme, as {names[0]} does"
    )


def tensors_of(run: Prepared) -> tuple[TensorKind, ...]:
    """Every tensor of the checkpoint that a run reads, quantized ones first."""
    inventory, entry = run.inventory, run.source.checkpoint.entry
    weights = {weight.tensor: _described(weight, run) for weight in inventory.weights}
    kept = {name: why for name, why in inventory.kept.items() if name not in weights or inventory.copied_head}
    counted = Counter((starred(name), entry(name).shape, True, text) for name, text in weights.items())
    counted.update((starred(name), entry(name).shape, False, why) for name, why in kept.items())
    return tuple(TensorKind(name, shape, count, done, why) for (name, shape, done, why), count in counted.items())


def _described(weight: Weight, run: Prepared) -> str:
    """The particulars of a weight: its own scheme, and how its experts are stored."""
    own = run.allocation.own.get(weight.name)
    stacked = f"{weight.slices} experts, stored {'[in, out]' if weight.transposed else '[out, in]'}"
    return ", ".join(filter(None, (str(own or ""), stacked if weight.stacked else "")))
