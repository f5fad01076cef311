"""Make the result from the parts of a run: shards, the files beside them, the account; or a format's own file."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from bitwright.checkpoint.account_file import write_account
from bitwright.checkpoint.merge import merge_shards
from bitwright.checkpoint.output import OutputFolder
from bitwright.core.account import Account, LinearReport
from bitwright.core.errors import OutputError, UserError
from bitwright.core.format import FileFormat, TensorFormat
from bitwright.core.progress import Listener
from bitwright.core.quantized import Difference
from bitwright.formats import QuantizedFolder
from bitwright.prepare.format_choice import DENSE, HOLDS_ALL, encoder
from bitwright.prepare.prepared import Prepared, settled_format, write_options
from bitwright.verification.engine_files import require_sound_file
from bitwright.verification.findings import Check
from bitwright.verification.soundness import is_ordinary, require_sound
from bitwright.written.account import account_of
from bitwright.written.beside_weights import copy_along, write_allocation, write_config
from bitwright.written.sink import Sink

ON_THE_WAY = "folder"
"""The name of the quantized folder, in the work folder, from which a file format is made."""
TOTALS = "totals"
WEIGHTS = (".safetensors", ".bin")
"""The endings of files that hold weights, in a folder of any format."""


def finish(run: Prepared, work: OutputFolder, sink: Sink, beside: Mapping[str, str], listener: Listener) -> Account:
    """Make the result in its work folder from all parts, and return its account."""
    target = run.target
    folder = work.work / ON_THE_WAY if isinstance(target, FileFormat) else work.path
    folder.mkdir(exist_ok=True)
    account = _make_folder(run, sink, folder, beside)
    if not isinstance(target, FileFormat):
        write_account(folder, account)
        return account
    place = work.file if target.single else work.path
    work.empty_result()  # a killed run may have written there
    account = account.without_digests
    along = {key: value for key, value in account.to_json().items() if key != TOTALS}
    model = QuantizedFolder.open(folder)
    differences = target.write(model, place, write_options(run.recipe, along), listener)
    verified = require_sound_file(target, place, model, differences)
    notes = (*account.notes, *notes_on(run.target.name, differences))
    assert account.totals is not None
    account = replace(
        account, totals=replace(account.totals, bytes_out=weight_bytes_of(place)), notes=notes, verified=verified
    )
    if not target.single:
        write_account(work.path, account)
    return account


def _make_folder(run: Prepared, sink: Sink, folder: Path, beside: Mapping[str, str]) -> Account:
    """Make a folder of shards with the files beside them, and verify it; return its account, not yet written."""
    checkpoint, inventory = run.source.checkpoint, run.inventory
    merge_shards(sink.parts, folder, run.recipe.shard_bytes, [checkpoint.stored(name) for name in inventory.as_stored])
    blocks = sink.reports
    rows = [row for block in blocks for row in block.linears]
    format = settled_format(run, rows)
    copy_along(checkpoint.folder, folder, beside)
    described = _describe(run, format, rows, folder)
    client, notes = _client(run, folder), tuple[str, ...]()
    if client is not None and client.passed is False and run.recipe.format is None and format.name != HOLDS_ALL:
        notes = (f"format {HOLDS_ALL}: transformers cannot load {format.name} of this model: {client.found}",)
        format = encoder(HOLDS_ALL)
        described = _describe(run, format, rows, folder)
        client = _client(run, folder)
    if client is not None and client.passed is False:
        raise OutputError(not_loadable(format, client))
    write_allocation(run.allocation, (*inventory.linears, *inventory.kept_linears), folder)
    verified = require_sound(folder, checkpoint.shapes, client)
    account = account_of(run, blocks, folder, format, described, verified)
    return replace(account, fallbacks=(*account.fallbacks, *notes))


def not_loadable(format: TensorFormat, client: Check) -> str:
    """The error of a folder that does not load, and what would do."""
    others = [f"--format {name}" for name in (HOLDS_ALL, DENSE) if name != format.name]
    return (
        f"what was written in format {format.name} does not load, and is not published: {client.found}. Take "
        f"{' or '.join(others)}, or leave the linear out (--exclude), with --restart"
    )


def _describe(run: Prepared, format: TensorFormat, rows: Sequence[LinearReport], folder: Path) -> dict[str, Any] | None:
    """Write the config.json of a format; return its quantization_config."""
    config = dict(run.source.checkpoint.config)
    if run.recipe.quantize_lm_head:
        config["tie_word_embeddings"] = False
    return write_config(config, format, run.written(rows), folder)


def _client(run: Prepared, folder: Path) -> Check | None:
    """Whether the folder loads and runs, asked of transformers; None if config.json and weights are ordinary.

    Then names and shapes of all parameters are known without transformers, which takes longer to import than a small
    model takes to quantize. For a file that is made of the folder, the format's own tables count, and the original has
    to run. Raises CheckpointError if it is the original that is at fault.
    """
    if is_ordinary(folder):
        return None
    from bitwright.verification.client import loads, require_running  # takes seconds, so only if it is asked

    if isinstance(run.target, FileFormat):
        require_running(run.source.checkpoint)
        return None
    return loads(folder, run.source.checkpoint)


@contextmanager
def leaving_nothing(work: OutputFolder) -> Iterator[None]:
    """A context that discards the work if a file cannot be made, because it would be begun anew anyway."""
    try:
        yield
    except OutputError:
        raise
    except UserError:
        work.discard()
        raise


def notes_on(format: str, differences: Sequence[Difference]) -> list[str]:
    """The notes on tensors that a format changed, with the relative squared errors.

    These are tensors that only this format quantizes, mostly embeddings, and linears whose codes were not kept.
    """
    also = [difference for difference in differences if difference.fresh]
    without = [difference for difference in differences if not (difference.fresh or difference.codes)]
    ways = ((also, "quantizes {} too"), (without, "has no place for the codes of {}"))
    return [f"format {format} {_with_error(how, these)}" for these, how in ways if these]


def _with_error(how: str, differences: Sequence[Difference]) -> str:
    names, most = ", ".join(lost.name for lost in differences), max(lost.error for lost in differences)
    return f"{how.format(names)}: relative error at most {most:.3g}, squared"


def weight_bytes_of(place: Path) -> int:
    """The bytes of a file, or of the weight files in a folder."""
    files = [place] if place.is_file() else [path for path in place.iterdir() if path.suffix in WEIGHTS]
    return sum(path.stat().st_size for path in files)
