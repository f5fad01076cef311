"""Run accuracy tasks on written folders, and refuse what can be refused before a model is loaded."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from hashlib import sha256
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer, PreTrainedModel

from bitwright.calibration.texts import BUILTIN, text_of
from bitwright.checkpoint.bounded_tokenizer import BoundedTokenizer, blaming_the_tokenizer
from bitwright.checkpoint.reader import file_fingerprint
from bitwright.core.errors import UserError
from bitwright.core.progress import Listener
from bitwright.evaluation.answers import Answers
from bitwright.evaluation.loading import left_out
from bitwright.evaluation.scores import TaskScore
from bitwright.model.config import text_config
from bitwright.model.source import open_checkpoint, require_tokenizer

if TYPE_CHECKING:
    from bitwright.evaluation.tasks import Prepared

EXTRA = ("lm_eval", "accelerate")
DEFAULT_CONTEXT = 2048
"""The number of tokens in a context if a config names no maximum; it is lm-eval's default."""
LIBRARIES = ("lm_eval", "transformers", "torch", "compressed-tensors")
DESCRIBE_THE_MODEL = (".json", ".model", ".txt", ".jinja")


@dataclass(frozen=True)
class TaskOptions:
    """The options of tasks; see ``evaluate``."""

    names: tuple[str, ...]
    files: tuple[Path, ...] = ()
    limit: int | None = None
    shots: int | None = None
    batch_size: int = 1
    allow_code_execution: bool = False
    answers: Path | None = None

    def __post_init__(self) -> None:
        if not self.names and any(getattr(self, option.name) != option.default for option in fields(self)[1:]):
            raise UserError("which tasks? Name them: --tasks piqa,arc_easy (in Python tasks=('piqa', 'arc_easy'))")
        for flag, value, least in (
            ("limit", self.limit, 1),
            ("shots", self.shots, 0),
            ("batch-size", self.batch_size, 1),
        ):
            if value is not None and value < least:
                raise UserError(f"--{flag} {value} was asked for; it must be at least {least}")


def prepare_tasks(options: TaskOptions, folder: Path) -> "tuple[Prepared, ...]":
    """Prepare the tasks and their data for the model in a folder. Raises UserError for tasks that cannot run."""
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        raise UserError(f"tasks need {' and '.join(missing)}, not installed here: pip install 'bitwright[tasks]'")
    from bitwright.evaluation.tasks import needs_end_of_text, prepare

    tokenizer = _tokenizer(folder)
    prepared = prepare(
        options.names,
        options.files,
        shots=options.shots,
        code_allowed=options.allow_code_execution,
        context=_context(folder),
    )
    if needs_end_of_text(prepared) and tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer in {folder} names no end of text (eos_token), and a task lets the model write until one; "
            "name it in tokenizer_config.json"
        )
    return prepared


def score(
    options: TaskOptions,
    prepared: "Sequence[Prepared]",
    folder: Path,
    model: PreTrainedModel,
    file: Path,
    listener: Listener,
) -> tuple[tuple[TaskScore, ...], tuple[str, ...]]:
    """Score a model that was loaded from a folder; return scores and notes. Answers are kept in a file at once."""
    from bitwright.evaluation.tasks import run_tasks

    with Answers(file, _answerer(folder, model)) as answers, blaming_the_tokenizer(folder):
        return run_tasks(
            prepared,
            model,
            _tokenizer(folder),
            answers,
            context=_context(folder),
            limit=options.limit,
            batch_size=options.batch_size,
            listener=listener,
        )


@contextmanager
def answers_file(options: TaskOptions, folders: Sequence[Path]) -> Iterator[Path | None]:
    """A context with the file for answers: the named file, or one in the user's cache, which is removed at the end.

    The name in the cache follows from the options, so that the same command finds the file again. It is None if no
    tasks are asked for. Raises OutputError if answers cannot be kept there.
    """
    if not options.names:
        yield None
        return
    path = options.answers or _in_cache(options, folders)
    with Answers(path, {}):
        pass
    yield path
    if options.answers is None:
        path.unlink(missing_ok=True)


def _in_cache(options: TaskOptions, folders: Sequence[Path]) -> Path:
    question = [str(folder.resolve()) for folder in folders], options.names, options.limit, options.shots
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return home / "bitwright" / "answers" / f"{sha256(json.dumps(question).encode()).hexdigest()[:16]}.jsonl"


def _context(folder: Path) -> int:
    """The number of tokens in the model's context."""
    named = getattr(text_config(open_checkpoint(folder)), "max_position_embeddings", None)
    return named if isinstance(named, int) and named > 0 else DEFAULT_CONTEXT


def _tokenizer(folder: Path) -> Any:
    """Load a tokenizer in this process, as lm-eval needs it, once it has tokenized a text within bounds."""
    require_tokenizer(folder)
    with BoundedTokenizer(folder) as bounded:
        bounded(text_of(BUILTIN, "evaluation"))
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _answerer(folder: Path, model: PreTrainedModel) -> dict[str, Any]:
    """Everything that an answer depends on, besides the question."""
    checkpoint = open_checkpoint(folder)
    texts = sorted(path for path in folder.iterdir() if path.suffix in DESCRIBE_THE_MODEL and path.is_file())
    return {
        "weights": checkpoint.fingerprint(),
        "written": checkpoint.modified(),
        "files": {path.name: file_fingerprint(path.read_bytes()) for path in texts if "timing" not in path.name},
        "queries": repr(left_out(folder)),
        "dtype": str(model.dtype),
        "device": model.device.type,
        "versions": {name: version(name) for name in LIBRARIES},
    }
