"""What happens to the tensors of a checkpoint, those that differ in their numbers alone taken together."""

from collections import Counter
from dataclasses import dataclass

from bitwright.api.job import Job
from bitwright.core.weight import Weight, starred


@dataclass(frozen=True)
class TensorKind:
    """``count`` tensors of one shape whose names differ where ``name`` has ``*``; ``why`` is empty for what is
    quantized, and says why another is kept."""

    name: str
    shape: tuple[int, ...]
    count: int
    quantized: bool
    why: str


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
    return f"{weight.slices} experts, stored {'[in, out]' if weight.turned else '[out, in]'}"
