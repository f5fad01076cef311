"""What a run needs of the machine, checked before the work: a place for its output, disk, memory and workers."""

import os
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path

from bitwright.checkpoint.output import refuse_existing, refuse_overlap, require_free, work_folder
from bitwright.core.errors import OutputError, RecipeError, shown
from bitwright.core.format import FileFormat
from bitwright.core.machine import usable_cores
from bitwright.core.recipe import size_in_bytes
from bitwright.model.source import find_folder
from bitwright.prepare.learned_parameters import saved_for
from bitwright.prepare.prepared import Prepared
from bitwright.stream.memory import RUNTIME_BYTES
from bitwright.stream.ranks import Ranks
from bitwright.stream.worker_pool import MOST_WORKERS, WORKER_BYTES, most_workers

WORTH_A_PROCESS = 2**25
"""Weights. For fewer a process of its own takes longer to start than to work."""


def place_to_save(run: Prepared, path: Path, output: Path) -> Path:
    """Refuse, before hours of training, a place where nothing can be saved, or a method with nothing to save.

    A file that this very run wrote before it was killed is no obstacle.
    """
    if not run.configuration.learns:
        raise RecipeError(f"{run.method} learns nothing, so --save-parameters {path} would stay empty; leave it out")
    _refuse_within(run.source.checkpoint.folder, path)
    if work_folder(output.resolve()).exists() and saved_for(path) == run.belonging:
        return path
    if path.exists() or not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        obstacle = "exists" if path.exists() else f"cannot be made: {path.absolute().parent} is no folder to write to"
        raise OutputError(f"--save-parameters {path} {obstacle}; name a new file in a folder that is there")
    return path


def refuse_output(model: Path, output: Path, overwrite: bool, single: bool = False) -> None:
    """Refuse an output, a folder or a ``single`` file, that its path alone rules out. Raises OutputError."""
    model = find_folder(model)
    try:
        refuse_overlap(model, output)
        _refuse_within(model, output)
        refuse_existing(output, overwrite, single)
        work_folder(output.resolve()).exists()  # its name is longer: perhaps too long
        around = next(folder for folder in output.resolve().parents if folder.exists())
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, links that go round in a circle
        raise OutputError(f"{output}: cannot be written: {error}; choose another output") from None
    if not (around.is_dir() and os.access(around, os.W_OK | os.X_OK)):
        obstacle = "may not be written to" if around.is_dir() else "is a file"
        raise OutputError(f"{output}: cannot be made: {around} {obstacle}; check permissions, or choose another output")


def _refuse_within(folder: Path, output: Path) -> None:
    """Raise OutputError for something written in the very folder that is read."""
    if folder.resolve() in output.resolve().parents:
        raise OutputError(
            f"{output}: lies in {folder}, which is read and would be changed by it; choose a place outside of it"
        )


def require_room(run: Prepared, output: Path) -> None:
    """Refuse a disk too small for all parts and one shard beside them, less what an earlier run has written."""
    total = run.bytes_out * (2 if isinstance(run.target, FileFormat) else 1)  # the folder that it is made of
    in_parts = total - sum(map(run.source.checkpoint.nbytes, run.inventory.as_stored))
    written = sum(path.stat().st_size for path in work_folder(output.resolve()).rglob("*.safetensors"))
    require_free(output, max(0, in_parts + min(total, run.recipe.shard_bytes) - written))


@dataclass(frozen=True)
class Workers:
    """``count`` processes beside this one, or none if it is 1. ``memory_bytes`` is what all of them need.

    ``note`` is what the user should know if more were asked for than the machine can run.
    """

    count: int
    memory_bytes: int
    note: str | None = None


def workers_for(run: Prepared, workers: int | None, max_memory: str | None, ranks: Ranks) -> Workers:
    """As many as were asked for, else as there are cores; fewer if cores or memory allow no more.

    Raises RecipeError for what cannot be: no worker at all or thousands, less memory than one needs, workers for a way
    that cannot be shared.
    """
    limit = None if max_memory is None else size_in_bytes(max_memory, "max memory")
    if workers is not None and (type(workers) is not int or workers < 1):
        raise RecipeError(f"workers {shown(workers)}: at least one is needed, and a whole number")
    if workers is not None and workers > MOST_WORKERS:
        raise RecipeError(
            f"workers {shown(workers)}: {MOST_WORKERS} processes are the most, and one for each of the "
            f"{usable_cores()} usable cores is the most that helps; leave it out, and their number is chosen"
        )
    process = run.way.budget(run.tokens, run.configuration.training)
    if not run.way.shares_out:
        _refuse(run, workers, max_memory, ranks)
        return Workers(1, process.total)
    asked = 1 if run.way.device.type != "cpu" else workers or _worth_while(run)
    alone, beside = process.total, process.total - RUNTIME_BYTES + WORKER_BYTES
    if limit is not None and limit < alone:
        smaller = ", or leave that tensor as it is with --exclude" if limit > RUNTIME_BYTES else ""
        raise RecipeError(
            f"--max-memory {max_memory}: one process alone needs about {alone / 1e9:.1f} GB, {RUNTIME_BYTES / 1e9:.1f} "
            f"of them for Python and torch, the others for the largest tensor; allow {ceil(alone / 1e8) / 10:g}GB"
            f"{smaller}"
        )
    possible = most_workers(asked, beside, ranks.beside)
    count = possible if limit is None else max(1, min(possible, (limit - RUNTIME_BYTES) // beside))
    note = _note(asked, possible, beside) if workers is not None and possible < asked else None
    return Workers(count, alone if count == 1 else RUNTIME_BYTES + count * beside, note)


def _worth_while(run: Prepared) -> int:
    weights = sum(prod(weight.shape) for weight in run.inventory.weights)
    return max(1, min(usable_cores(), weights // WORTH_A_PROCESS))


def _note(asked: int, possible: int, nbytes: int) -> str:
    cores = usable_cores()
    bound = f"memory for {possible} of {nbytes / 1e9:.1f} GB each" if possible < cores else f"{cores} usable cores"
    return f"--workers {asked}: this machine has {bound}, so {possible} {'is' if possible == 1 else 'are'} used"


def _refuse(run: Prepared, workers: int | None, max_memory: str | None, ranks: Ranks) -> None:
    asked = {"--workers": workers, "--max-memory": max_memory, "torchrun": ranks.count if ranks.count > 1 else None}
    for flag, value in asked.items():
        if value is not None:
            raise RecipeError(
                f"{flag} shares tensors out between processes, and {run.method} goes block by block here; leave it "
                "out, or take methods that look at one weight alone (rtn, easyquant), without --calibration"
            )
