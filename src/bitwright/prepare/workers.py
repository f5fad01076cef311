"""How many worker processes share the tensors, and what memory they may take."""

import os
from dataclasses import dataclass
from math import ceil, prod

from bitwright.core.errors import RecipeError
from bitwright.core.recipe import size_in_bytes
from bitwright.prepare.prepared import Prepared
from bitwright.stream.memory import RUNTIME_BYTES, WORKER_BYTES
from bitwright.stream.ranks import Ranks

WORTH_A_PROCESS = 2**25
"""Weights. For fewer a process of its own takes longer to start than to work."""


@dataclass(frozen=True)
class Workers:
    """``count`` processes beside this one, or none if it is 1. ``memory_bytes`` is what all of them need."""

    count: int
    memory_bytes: int


def workers_for(run: Prepared, workers: int | None, max_memory: str | None, ranks: Ranks) -> Workers:
    """As many as were asked for, else as there are cores; fewer if memory allows no more.

    Raises RecipeError for what cannot be: no worker at all, less memory than one needs, workers for a way that cannot
    be shared.
    """
    limit = None if max_memory is None else size_in_bytes(max_memory, "max memory")
    if workers is not None and (type(workers) is not int or workers < 1):
        raise RecipeError(f"workers {workers!r}: at least one is needed, and a whole number")
    process = run.way.budget(run.tokens, run.configuration.training)
    if not run.way.shares_out:
        _refuse(run, workers, max_memory, ranks)
        return Workers(1, process.total)
    count = 1 if run.way.device.type != "cpu" else workers or _worth_while(run, ranks)
    alone, beside = process.total, process.total - RUNTIME_BYTES + WORKER_BYTES
    if limit is not None and limit < alone:
        smaller = ", or leave that tensor as it is with --exclude" if limit > RUNTIME_BYTES else ""
        raise RecipeError(
            f"--max-memory {max_memory}: one process alone needs about {alone / 1e9:.1f} GB, {RUNTIME_BYTES / 1e9:.1f} "
            f"of them for Python and torch, the others for the largest tensor; allow {ceil(alone / 1e8) / 10:g}GB"
            f"{smaller}"
        )
    if limit is not None:
        count = max(1, min(count, (limit - RUNTIME_BYTES) // beside))
    return Workers(count, alone if count == 1 else RUNTIME_BYTES + count * beside)


def _worth_while(run: Prepared, ranks: Ranks) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    weights = sum(prod(weight.shape) for weight in run.inventory.weights)
    return max(1, min(cores // ranks.beside, weights // WORTH_A_PROCESS))


def _refuse(run: Prepared, workers: int | None, max_memory: str | None, ranks: Ranks) -> None:
    asked = {"--workers": workers, "--max-memory": max_memory, "torchrun": ranks.count if ranks.count > 1 else None}
    for flag, value in asked.items():
        if value is not None:
            raise RecipeError(
                f"{flag} shares tensors out between processes, and {run.method} goes block by block here; leave it "
                "out, or take methods that look at one weight alone (rtn, easyquant), without --calibration"
            )
