"""The checks of an engine's own file (gguf, mlc), which is read back.

Before it is published it has to be complete, its numbers finite, its length as it states, and its weights those of the
folder that it was made from.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bitwright.core.convert import rows_of
from bitwright.core.decoder import HEAD
from bitwright.core.engine_file import EngineFile, Rows, WithSettings, unlike
from bitwright.core.errors import CheckpointError
from bitwright.core.format import FileFormat
from bitwright.core.progress import Listener, Progress, silent
from bitwright.core.qtensor import QTensor
from bitwright.core.quantized import Difference
from bitwright.core.weight import NO_WEIGHTS
from bitwright.formats import QuantizedFolder
from bitwright.stream.memory import peak_memory
from bitwright.stream.units import block_of
from bitwright.verification.beside_original import error_in_parts
from bitwright.verification.findings import Check, first, lacking
from bitwright.verification.soundness import published_only_if

MEASURED = 1e-3
"""The difference, as a share, that a linear's error may have from the error measured when it was written."""
SMALLEST = 1e-9
"""The part of an error that may be rounding."""


def file_structure(file: EngineFile, listener: Listener = silent, alone: bool = True) -> list[Check]:
    """Check a file by itself; scales, and values that are stored as they are, are read.

    ``alone``: there is no folder to tell whether it is complete, if its architecture does not.
    """
    wrong, unread = list[str](), list[str]()
    for done, name in enumerate(file.tensors):
        listener(Progress("verify", done, len(file.tensors), name, peak_memory()))
        if not file.is_read(name):
            unread.append(name)
        elif fault := file.numbers(name):
            wrong.append(f"{name}: {fault}")
    listener(Progress("verify", len(file.tensors), len(file.tensors), "all tensors", peak_memory()))
    summary, passed = first(wrong) or "scales finite, shapes fit", None if unread and not wrong else not wrong
    if unread:
        kind = file.tensors[unread[0]].kind
        summary += f"; not looked at: {len(unread)} tensors of types that are not read, such as {unread[0]} ({kind})"
    return [_complete(file, alone), Check("scales and shapes", passed, summary), _on_disk(file)]


def not_compared(file: EngineFile, alone: bool) -> list[Check]:
    """Say what is not looked at: if a file is ``alone``, without a folder to compare it with, its weights are not."""
    unseen = "not looked at: whether they are the model's; --against ORIGINAL tells"
    checks = [Check("weights", None, unseen, matters=False)] if alone else []
    if isinstance(file, WithSettings) and file.unread:
        checks.append(Check("texts", None, f"not looked at: {file.unread}", matters=False))
    return checks


def settings(file: EngineFile) -> Iterator[Check]:
    """Check that the engine can compute with what the file says of itself."""
    if not isinstance(file, WithSettings):
        return
    wrong = file.impossible()
    if file.unknown and not wrong:
        unseen = f"not looked at, but for what every model has: {file.unknown}"
        yield Check("possible settings", None, unseen, matters=False)
        return
    yield Check("possible settings", not wrong, first(wrong) or "numbers that the engine can compute with")


def bits_per_weight(file: EngineFile) -> float:
    """The bits per weight that are stored for the linears in the model's blocks; 0 if these are not known."""
    stored, weights = file.bits()
    return stored / weights if weights else 0.0


def linears_of(file: EngineFile) -> list[str]:
    """The linears of the blocks, by the folder's names."""
    return [name for name in file.names if block_of(name) is not None and len(file.shape(name)) == 2]


def require_sound_file(
    format: FileFormat, place: Path, model: QuantizedFolder, differences: Sequence[Difference]
) -> str:
    """Read back a file that has just been written from a folder; return the findings in a line.

    Headers, shapes and scales of everything are checked, and the weights of one linear of each kind, from the first
    block to the last. Raises OutputError if a check fails.
    """
    try:
        file = format.open(place)
    except CheckpointError as error:
        return published_only_if([Check("readable", False, str(error))])
    published_only_if(list(settings(file)))
    lost = {difference.name: difference for difference in differences}
    return published_only_if([*file_structure(file), *_as_in_folder(file, model, lost)])


def not_there(file: EngineFile, model: QuantizedFolder) -> list[str]:
    """The tensors of a folder that a file lacks, or has in another shape."""
    here, wrong = set(file.names), []
    tied = bool(model.config.get("tie_word_embeddings"))
    for name in (*model.passed, *model.linears, *model.stacks):
        full = f"{name}.weight" if name in model.linears else name
        if full.endswith(NO_WEIGHTS) or (tied and full == f"{HEAD}.weight" and full not in here):
            continue
        if full not in here:
            wrong.append(full)
        elif file.shape(full) != tuple(model.shape(name)):
            wrong.append(f"{full} of shape {list(model.shape(name))} (but {list(file.shape(full))})")
    return wrong


def _complete(file: EngineFile, alone: bool) -> Check:
    wanted, there = file.wanted, file.tensors
    if wanted is None:
        return Check("complete", None, f"not looked at: {file.unknown}", matters=alone)
    wrong = lacking(sorted(set(wanted.needed) - set(there)))
    shapes = {**wanted.needed, **wanted.allowed}
    odd = [f"{name} is {list(there[name].shape)}, the architecture's {list(shape)}"
           for name, shape in shapes.items() if name in there and there[name].shape != shape]  # fmt: skip
    more = [f"{name} is no tensor of the architecture" for name in sorted(set(there) - set(shapes))]
    wrong = wrong or first(odd) or first(more)
    return Check("complete", not wrong, wrong or f"{len(there)} tensors of the architecture, each once")


def _on_disk(file: EngineFile) -> Check:
    stored, wrong = bits_per_weight(file), file.misfiled
    summary = f"{stored:.3f} bits per weight stored" if stored else "as long as it says it is"
    return Check("size on disk", wrong is None, summary if wrong is None else wrong)


def _as_in_folder(file: EngineFile, model: QuantizedFolder, lost: dict[str, Difference]) -> Iterator[Check]:
    missing = not_there(file, model)
    yield Check("all of the folder", not missing, lacking(missing) or "all tensors of the folder")
    if missing:
        return
    linears = _of_each_kind(model.linears or [name.removesuffix(".weight") for name in linears_of(file)])
    wrong = [f"{name}: {fault}" for name in linears if (fault := _apart(file, model, name, lost.get(name)))]
    summary = f"{len(linears)} linears read back, as they are in the folder"
    yield Check("written weights", not wrong, first(wrong) or summary)


def _of_each_kind(linears: Sequence[str]) -> list[str]:
    """One linear of each kind, the first kind from the first block, the last kind from the last block.

    Kinds in between are taken from blocks in between.
    """
    kinds: dict[str, list[str]] = {}
    for name in linears:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    last = max(1, len(kinds) - 1)
    return [names[round((len(names) - 1) * at / last)] for at, names in enumerate(kinds.values())]


def _apart(file: EngineFile, model: QuantizedFolder, linear: str, lost: Difference | None) -> str | None:
    """The difference of a linear from the folder, beyond what the writer has measured; None if there is none."""
    name = f"{linear}.weight"
    if lost is None:  # not quantized: as it is, in float16
        before = model.tensor(name)
        same = all(torch.equal(values, before[rows].half().float()) for rows, values in file.values(name))
        return None if same else "not the folder's weights in float16"
    weight = model.read(linear)
    if lost.codes:
        compared = (unlike(weight, rows, stored) for rows, stored in file.levels(name))
        if part := next(filter(None, compared), None):
            return f"{part} are not those of the folder"
    error = error_of(file, name, _by_rows(weight))
    if abs(error - lost.error) > MEASURED * lost.error + SMALLEST:
        return f"a relative error of {error:.3g} from the folder, {lost.error:.3g} was measured in writing"
    return None


def error_of(file: EngineFile, name: str, before: Callable[[Rows], Tensor]) -> float:
    """The error ``|W - Wx|^2 / |W|^2`` of a tensor of the folder, whose rows ``before`` gives; some rows at a time."""
    return error_in_parts((before(rows), values) for rows, values in file.values(name))


def _by_rows(weight: QTensor) -> Callable[[Rows], Tensor]:
    """The rows of a weight in float32, each computed when it is asked for if that can be done without the others."""
    if weight.tile.size(weight.shape)[0] != 1 or weight.outlier_index is not None:
        return weight.dequantize(torch.float32).__getitem__
    return lambda rows: rows_of(weight, rows).dequantize(torch.float32)
