"""evaluate(): measure a written folder, loaded as its users load it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from bitwright.calibration.segments import Segments
from bitwright.calibration.texts import BUILTIN
from bitwright.core.errors import UserError
from bitwright.core.progress import Listener, silent
from bitwright.evaluation.loading import Loaded, load_with_loader
from bitwright.evaluation.measure import MODEL, Measurement, measure
from bitwright.evaluation.scores import TaskScore, side_by_side
from bitwright.evaluation.scoring import TaskOptions, answers_file, prepare_tasks, score
from bitwright.evaluation.windows import evaluation_windows, require_protocol
from bitwright.model.config import text_config
from bitwright.model.source import (
    check_vocabulary,
    open_checkpoint,
    open_tokenizer,
    pick_device,
    pick_dtype,
    sequence_length,
)


@dataclass(frozen=True)
class Evaluation:
    """The measurements of a folder, with its text, the dtype of the arithmetic, and its bytes on disk.

    ``loader`` is "transformers" or "bitwright". It is "bitwright" if Bitwright dequantizes the folder (gptq, awq), or
    quantizes the queries because the folder's config cannot say so. ``text`` and ``measurement`` are None if only
    tasks were asked for; ``tasks`` is empty if only a text was.
    """

    folder: str
    text: str | None
    reference: str | None
    loader: str
    dtype: str
    device: str
    weight_bytes: int
    measurement: Measurement | None
    tasks: tuple[TaskScore, ...] = ()
    notes: tuple[str, ...] = ()


def evaluate(
    folder: Path | str,
    text: str | None = None,
    *,
    text_field: str | None = None,
    protocol: str = MODEL,
    seqlen: int | None = None,
    windows: int | None = None,
    reference: Path | str | None = None,
    tasks: Sequence[str] = (),
    task_files: Sequence[Path | str] = (),
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 1,
    allow_code_execution: bool = False,
    answers: Path | str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    listener: Listener = silent,
) -> Evaluation:
    """Measure the perplexity of a folder, original or quantized, and its accuracy on lm-eval's tasks.

    If ``text`` is None, the embedded text is measured, or no text if tasks are asked for. ``text_field`` is the field
    of its rows, if it is another one than ``messages``, ``conversations`` or ``text``. By the ``protocol`` "model",
    each window is a text as the model was trained to see it, with its BOS in front; by "papers", the whole text is one
    stream of tokens. ``seqlen`` None is 2048 tokens, or the model's maximum if that is shorter. ``windows`` None is the
    whole text. With a ``reference``, the divergence from it and its own accuracy are measured too.

    ``task_files`` are lm-eval's YAML files, or folders of them; their tasks can be named in ``tasks``. Each task asks
    ``limit`` documents, with ``shots`` examples (None: the task's own number). Every answer is kept at once, so that a
    killed run goes on: in the file ``answers``, or in the user's cache until the run is done. Raises UserError.
    """
    asked = TaskOptions(
        names=tuple(tasks),
        files=tuple(map(Path, task_files)),
        limit=limit,
        shots=shots,
        batch_size=batch_size,
        allow_code_execution=allow_code_execution,
        answers=None if answers is None else Path(answers),
    )
    if text is None and not tasks:
        text = BUILTIN
    require_protocol(protocol)
    if text is None and (seqlen, windows, text_field, protocol) != (None, None, None, MODEL):
        raise UserError(
            "--seqlen, --windows, --text-field and --protocol are about a text, and only tasks were asked for; add "
            "--text FILE"
        )
    pair = _Pair.open(Path(folder), None if reference is None else Path(reference), device, dtype)
    of_text = list[str]()
    cut = None
    if text is not None:
        cut = _windows(pair.folder, text, text_field, protocol, seqlen, windows, of_text.append)
    prepared = prepare_tasks(asked, pair.folder) if tasks else ()
    with answers_file(asked, pair.folders) as file:
        loaded = pair.load(pair.folder)
        models = [loaded.model]
        loader = loaded.loader
        del loaded  # so that the tasks can free the model
        measured = None if cut is None else replace(_measure(pair, models[0], cut, listener), protocol=protocol)
        scores, notes = ((), ()) if file is None else _score(pair, models, asked, prepared, file, listener)
    return Evaluation(
        folder=str(folder),
        text=text,
        reference=None if reference is None else str(reference),
        loader=loader,
        dtype=_name(pair.arithmetic),
        device=str(pair.where),
        weight_bytes=open_checkpoint(pair.folder).total_bytes,
        measurement=measured,
        tasks=scores,
        notes=(*of_text, *notes),
    )


@dataclass(frozen=True)
class _Pair:
    """A folder and, if there is one, the original; both are loaded with one dtype on one device."""

    folder: Path
    reference: Path | None
    where: torch.device
    arithmetic: torch.dtype

    @classmethod
    def open(cls, folder: Path, reference: Path | None, device: str, dtype: str) -> "_Pair":
        """Check both folders before the text is read. Raises UserError for what cannot be loaded."""
        checkpoint = open_checkpoint(folder)
        folder = checkpoint.folder
        config = text_config(checkpoint)
        where = pick_device(device)
        arithmetic = pick_dtype(dtype, where, checkpoint.dtype_of_weights)
        if reference is not None:
            reference = _checked_reference(reference, config.vocab_size)
        return cls(folder, reference, where, arithmetic)

    @property
    def folders(self) -> list[Path]:
        """The folder, and the original if there is one."""
        return [self.folder] if self.reference is None else [self.folder, self.reference]

    def load(self, folder: Path) -> Loaded:
        """Load one of the two folders, ready to run."""
        return load_with_loader(folder, device=str(self.where), dtype=_name(self.arithmetic))


def _windows(
    folder: Path,
    text: str,
    field: str | None,
    protocol: str,
    seqlen: int | None,
    windows: int | None,
    say: Callable[[str], None],
) -> Segments:
    """The text as windows of the model's tokens."""
    config = text_config(open_checkpoint(folder))
    length = sequence_length(seqlen, getattr(config, "max_position_embeddings", None))
    tokenizer = open_tokenizer(folder)
    cut = evaluation_windows(text, tokenizer, seqlen=length, windows=windows, protocol=protocol, field=field, say=say)
    check_vocabulary(cut.tokens, config, folder)
    return cut


def _measure(pair: _Pair, model: PreTrainedModel, cut: Segments, listener: Listener) -> Measurement:
    original = None if pair.reference is None else pair.load(pair.reference).model
    measured = measure(model, cut.tokens, original, beginning=cut.beginning, listener=listener)
    return replace(measured, begins_with=cut.begins_with)


def _score(
    pair: _Pair,
    models: list[PreTrainedModel],
    asked: TaskOptions,
    prepared: Sequence[Any],
    file: Path,
    listener: Listener,
) -> tuple[tuple[TaskScore, ...], tuple[str, ...]]:
    """The model's scores, and beside them the original's.

    The model is removed from the list, so that it leaves memory before the original is loaded.
    """
    scores, notes = score(asked, prepared, pair.folder, models.pop(), file, listener)
    if pair.reference is None:
        return scores, notes
    originals, _ = score(asked, prepared, pair.reference, pair.load(pair.reference).model, file, listener)
    return side_by_side(scores, originals), notes


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _checked_reference(folder: Path, vocabulary: int) -> Path:
    """The reference's folder, refused if it cannot be the original, before the text is read and a model is loaded."""
    checkpoint = open_checkpoint(folder)
    size = text_config(checkpoint).vocab_size
    if size != vocabulary:
        raise UserError(
            f"the reference {folder} has a vocabulary of {size}, the model one of {vocabulary}; "
            "the reference must be the model that was quantized"
        )
    return checkpoint.folder
