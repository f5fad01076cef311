"""The output of a run, checked before the work: what could not be written after it is refused."""

import os
from pathlib import Path

from bitwright.checkpoint.output import refuse_existing, refuse_overlap, require_free, work_folder
from bitwright.core.errors import OutputError, RecipeError
from bitwright.core.format import FileFormat
from bitwright.model.source import require_folder
from bitwright.prepare.learned_parameters import saved_for
from bitwright.prepare.prepared import Prepared


def place_to_save(run: Prepared, path: Path, output: Path) -> Path:
    """Refuse, before hours of training, a place where nothing can be saved, or a method with nothing to save.

    A file that this very run wrote before it was killed is no obstacle.
    """
    if not run.configuration.learns:
        raise RecipeError(f"{run.method} learns nothing, so --save-parameters {path} would stay empty; leave it out")
    _refuse_within(Path(run.recipe.model), path)
    if work_folder(output.resolve()).exists() and saved_for(path) == run.belonging:
        return path
    if path.exists() or not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        obstacle = "exists" if path.exists() else f"cannot be made: {path.absolute().parent} is no folder to write to"
        raise OutputError(f"--save-parameters {path} {obstacle}; name a new file in a folder that is there")
    return path


def refuse_output(model: Path, output: Path, overwrite: bool, single: bool = False) -> None:
    """Refuse an output, a folder or a ``single`` file, that its path alone rules out. Raises OutputError."""
    require_folder(model)
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
