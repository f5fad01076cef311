"""How many worker processes go through the tensors, and what memory they may take."""

import os
from dataclasses import dataclass, field
from math import ceil, prod

from bitwright.core.errors import RecipeError
from bitwright.core.recipe import size_in_bytes
from bitwright.prepare.job import Job
from bitwright.prepare.tensor_work import TensorWork
from bitwright.stream.memory import RUNTIME_BYTES, WORKER_BYTES
from bitwright.stream.ranks import Ranks
from bitwright.stream.worker_pool import WorkerPool

WORTH_A_PROCESS = 2**25
"""Weights. For fewer a process of its own takes longer to start than to work."""


@dataclass(frozen=True)
class Crew:
    """``workers`` processes beside this one, or none where it is 1; ``memory_bytes`` is what all of them need;
    ``pool`` holds those that have been started."""

    workers: int
    memory_bytes: int
    pool: WorkerPool = field(default_factory=WorkerPool)


def crew_of(job: Job, workers: int | None, max_memory: str | None, ranks: Ranks | None = None) -> Crew:
    """As many as were asked for, else as there are cores; fewer where memory allows no more.

    Raises RecipeError for what cannot be: no worker at all, less memory than one needs, workers for what goes block by
    block.
    """
    ranks = ranks or Ranks()
    limit = None if max_memory is None else size_in_bytes(max_memory, "max memory")
    if workers is not None and (type(workers) is not int or workers < 1):
        raise RecipeError(f"workers {workers!r}: at least one is needed, and a whole number")
    each = job.work.budget(job.configuration.training)
    if not isinstance(job.work, TensorWork):
        _refuse_for_blocks(job, workers, max_memory, ranks)
        return Crew(1, each.total)
    count = 1 if job.work.device.type != "cpu" else workers or _worth_while(job, ranks)
    alone, beside = each.total, each.total - RUNTIME_BYTES + WORKER_BYTES
    if limit is not None and limit < alone:
        smaller = ", or leave that tensor as it is with --exclude" if limit > RUNTIME_BYTES else ""
        raise RecipeError(
            f"--max-memory {max_memory}: one process alone needs about {alone / 1e9:.1f} GB, {RUNTIME_BYTES / 1e9:.1f} "
            f"of them for Python and torch, the others for the largest tensor; allow {ceil(alone / 1e8) / 10:g}GB"
            f"{smaller}"
        )
    if limit is not None:
        count = max(1, min(count, (limit - RUNTIME_BYTES) // beside))
    return Crew(count, alone if count == 1 else RUNTIME_BYTES + count * beside)


def _worth_while(job: Job, ranks: Ranks) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    weights = sum(prod(weight.shape) for weight in job.work.weights)
    return max(1, min(cores // ranks.beside, weights // WORTH_A_PROCESS))


def _refuse_for_blocks(job: Job, workers: int | None, max_memory: str | None, ranks: Ranks) -> None:
    asked = {"--workers": workers, "--max-memory": max_memory, "torchrun": ranks.count if ranks.count > 1 else None}
    for flag, value in asked.items():
        if value is not None:
            raise RecipeError(
                f"{flag} shares tensors out between processes, and {job.method} goes block by block here; leave it "
                "out, or take methods that look at one weight alone (rtn, easyquant), without --calibration"
            )
