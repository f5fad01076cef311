"""bench(): measure speed and memory of a model, and of the original in the same run."""

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitwright.api.exporting import export
from bitwright.core.child_process import python_command
from bitwright.core.engine import BenchInput
from bitwright.core.errors import CheckpointError, UserError, in_shell, shown
from bitwright.core.machine import usable_cores
from bitwright.core.progress import Listener, silent
from bitwright.evaluation.contenders import (
    chosen_engine,
    llama_cpp_command,
    refuse_idle,
    require_gguf,
    require_same_folders,
    require_same_in_files,
)
from bitwright.evaluation.speed import Contender, Speed, measure_in_turn
from bitwright.formats import CONFIG
from bitwright.model.config import text_config
from bitwright.model.source import open_checkpoint, pick_device, pick_dtype

MOST_THREADS = 64
"""The most threads on a machine with fewer cores than that; each takes memory."""
TRANSFORMERS = "bitwright.evaluation.transformers_speed"


@dataclass(frozen=True)
class Bench:
    """The speed and memory of a model, and of the original if one is named.

    ``rows`` are the model and the original. ``weight_ratio`` and ``memory_ratio`` are the model's bytes divided by the
    original's. The speedups are the model's tokens per second divided by the original's. Without an original, ratios
    and speedups are None.
    """

    engine: str
    version: str
    device: str
    dtype: str | None
    threads: int
    prompt: int
    tokens: int
    rounds: int
    rows: tuple[Speed, ...]
    weight_ratio: float | None = None
    memory_ratio: float | None = None
    speedup: float | None = None
    prompt_speedup: float | None = None


@dataclass(frozen=True)
class _Lengths:
    """The number of tokens to read, of tokens to generate, and of threads."""

    prompt: int
    tokens: int
    threads: int


@dataclass(frozen=True)
class _Program:
    """A program that times a model: its command, the request without the model, its device and dtype.

    ``other`` is True if the command is of another Python than this one.
    """

    command: tuple[str, ...]
    request: Mapping[str, Any]
    device: str
    dtype: str | None
    other: bool = False

    def contender(self, role: str, name: Path, loaded: Path) -> Contender:
        """A model to be measured: it is shown as ``name``, and loaded from ``loaded``."""
        return Contender(role, str(name), self.command, {**self.request, "model": str(loaded)}, self.other)


def bench(
    model: Path | str,
    against: Path | str | None = None,
    *,
    engine: str | None = None,
    tokens: int = 512,
    prompt: int = 512,
    threads: int | None = None,
    rounds: int = 3,
    device: str = "auto",
    dtype: str = "auto",
    python: Path | str | None = None,
    library: Path | str | None = None,
    listener: Listener = silent,
) -> Bench:
    """Measure speed and memory of a model, and in turn of the original, ``against``.

    Measured are the bytes of the weights, the bytes of memory while running, the tokens per second when generating
    ``tokens`` tokens from an empty context at batch 1, and the tokens per second when reading a prompt of ``prompt``
    tokens.

    Engine transformers measures folders, llama.cpp measures .gguf files; None chooses by the kind of model. For
    llama.cpp, ``against`` may be an unquantized folder, which becomes a temporary F16 file. ``python`` is an
    interpreter that has xllamacpp, ``library`` the shared library of a llama.cpp built elsewhere. ``device`` and
    ``dtype`` are for transformers. ``dtype`` "auto" is the checkpoint's own dtype if it has 16 bits, else bfloat16.
    Raises UserError.
    """
    for name, value in (("tokens", tokens), ("prompt", prompt), ("rounds", rounds), ("threads", threads)):
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1")
    cores = usable_cores()
    most = max(cores, MOST_THREADS)
    if threads is not None and threads > most:
        raise UserError(f"--threads is {shown(threads)}; {most} are the most, with {cores} usable cores here")
    model, against = Path(model), None if against is None else Path(against)
    chosen = chosen_engine(model, engine)
    lengths = _Lengths(prompt, tokens, threads or cores)
    refuse_idle(chosen, device=device, dtype=dtype, python=python, library=library)
    with ExitStack() as stack:
        if chosen.bench is BenchInput.GGUF:
            program = _llama_cpp(lengths, python, library)
            original = None if against is None else _gguf_original(model, against, stack, listener)
        else:
            program, original = _transformers(model, against, lengths, device, dtype), against
        contenders = [program.contender("model", model, model)]
        if against is not None and original is not None:
            contenders.append(program.contender("original", against, original))
        rows, version = measure_in_turn(contenders, rounds, listener)
    run = (program.device, program.dtype, lengths.threads, prompt, tokens, rounds, tuple(rows))
    return Bench(chosen.name, version, *run, *_ratios(rows))


def _transformers(model: Path, against: Path | None, lengths: _Lengths, device: str, dtype: str) -> _Program:
    """Choose device and dtype. Raises UserError, before any process starts, if a model cannot be loaded."""
    where, stored = pick_device(device), open_checkpoint(model).dtype_of_weights
    sixteen = stored if stored in (torch.bfloat16, torch.float16) else torch.bfloat16
    arithmetic = str(sixteen if dtype == "auto" else pick_dtype(dtype, where, stored)).removeprefix("torch.")
    for folder in (model, *([] if against is None else [against])):
        if folder.is_file():
            raise CheckpointError(f"--against {folder} is a file; engine transformers compares folders")
        _require_room(folder, max(lengths.prompt, lengths.tokens))
    if against is not None:
        require_same_folders(model, against)
    request = {**vars(lengths), "device": str(where), "dtype": arithmetic}
    return _Program(python_command(TRANSFORMERS), request, str(where), arithmetic)


def _require_room(folder: Path, tokens: int) -> None:
    """Raise UserError if more tokens are asked for than a model takes."""
    longest = getattr(text_config(open_checkpoint(folder)), "max_position_embeddings", None)
    if longest is not None and tokens > longest:
        raise UserError(
            f"{folder} takes {longest} tokens at most, and {tokens} were asked for; give --prompt and --tokens of at "
            f"most {longest}"
        )


def _llama_cpp(lengths: _Lengths, python: Path | str | None, library: Path | str | None) -> _Program:
    command, path = llama_cpp_command(python, library)
    return _Program(command, {**vars(lengths), "library": path}, "as llama.cpp chooses", None, python is not None)


def _gguf_original(model: Path, against: Path, stack: ExitStack, listener: Listener) -> Path:
    """The original as a GGUF file; a folder is written as F16 to a file that is removed when ``stack`` is closed.

    Raises CheckpointError if it is another model, or a quantized folder.
    """
    require_same_in_files(model, against)
    if not against.is_dir():
        require_gguf(against)
        return against
    if open_checkpoint(against).config.get(CONFIG) is not None:
        raise CheckpointError(
            f"--against {against} is quantized; name the original, or write it with bitwright export "
            f"{in_shell(against)} --format gguf --output FILE.gguf and name that file"
        )
    file = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bitwright-bench-")), "original-f16.gguf")
    export(against, file, format="gguf", embeddings="f16", listener=listener)
    return file


def _ratios(rows: list[Speed]) -> tuple[float, ...]:
    if len(rows) < 2:
        return ()
    model, original = rows
    return (
        model.weight_bytes / original.weight_bytes,
        model.peak_bytes / original.peak_bytes,
        model.tokens_per_second / original.tokens_per_second,
        model.prompt_tokens_per_second / original.prompt_tokens_per_second,
    )
