"""bench(): the papers' table of speed and memory, the quantized model beside the original in the same run."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bitwright.api.exporting import export
from bitwright.core.errors import CheckpointError, RecipeError, UserError
from bitwright.core.progress import Listener, silent
from bitwright.evaluation import llamacpp_speed
from bitwright.evaluation.contenders import (
    chosen_engine,
    refuse_idle,
    require_gguf,
    require_same_folders,
    require_same_in_files,
)
from bitwright.evaluation.loading import load
from bitwright.evaluation.speed import Contender, Speed, measure_in_turn, time_model
from bitwright.formats import CONFIG
from bitwright.model.config import model_config
from bitwright.model.source import open_checkpoint, pick_device, pick_dtype


@dataclass(frozen=True)
class Bench:
    """What was measured. ``rows`` are the model and, where there is one, the original; the figures of both in relation
    are None without. ``weight_ratio`` and ``memory_ratio`` are the model's bytes over the original's, the speedups its
    tokens per second over the original's.
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
class _Asked:
    """What every process is asked, and where it runs."""

    prompt: int
    tokens: int
    threads: int
    device: str
    dtype: str
    python: str
    library: str | None = None


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
    """Weight memory, running memory, tokens per second when generating ``tokens`` from an empty context at batch 1, and
    prompt tokens per second, of a model and of the original that it stands ``against``.

    Engine transformers (None for a folder) takes folders, llama.cpp (None for a .gguf file) files; there ``against``
    may be an unquantized folder, which is written as F16 for the while, ``python`` an interpreter that has xllamacpp,
    or ``library`` the shared library of a llama.cpp built elsewhere; ``device`` and ``dtype`` are for transformers.
    ``dtype`` "auto" is 16 bits: the checkpoint's own where it has them, else bfloat16. Raises UserError.
    """
    for name, value in (("tokens", tokens), ("prompt", prompt), ("rounds", rounds), ("threads", threads)):
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1")
    model, against = Path(model), None if against is None else Path(against)
    chosen, threads = chosen_engine(model, engine), threads or len(os.sched_getaffinity(0))
    refuse_idle(chosen, device=device, dtype=dtype, python=python, library=library)
    with ExitStack() as stack:
        if chosen == "llama.cpp":
            asked = _Asked(prompt, tokens, threads, "cpu", "", *_llama_cpp(python, library))
            contenders = _in_llama_cpp(model, against, asked, stack, listener)
        else:
            asked = _for_transformers(model, against, prompt, tokens, threads, device, dtype)
            contenders = _in_transformers(model, against, asked)
        rows, runner = measure_in_turn(contenders, rounds, listener)
    where, kind = (asked.device, asked.dtype) if asked.dtype else ("as llama.cpp chooses", None)
    return Bench(chosen, runner, where, kind, threads, prompt, tokens, rounds, tuple(rows), *_related(rows))


def _for_transformers(
    model: Path, against: Path | None, prompt: int, tokens: int, threads: int, device: str, dtype: str
) -> _Asked:
    """Refuses what cannot be loaded, before any process is started."""
    where, stored = pick_device(device), open_checkpoint(model).dtype_of_weights
    sixteen = stored if stored in (torch.bfloat16, torch.float16) else torch.bfloat16
    arithmetic = sixteen if dtype == "auto" else pick_dtype(dtype, where, stored)
    for folder in (model, *([] if against is None else [against])):
        if folder.is_file():
            raise CheckpointError(f"--against {folder} is a file; engine transformers compares folders")
        open_checkpoint(folder)
        longest = getattr(model_config(folder), "max_position_embeddings", None)
        if longest is not None and max(prompt, tokens) > longest:
            raise UserError(
                f"{folder} takes {longest} tokens at most, and {max(prompt, tokens)} were asked for; give --prompt and "
                f"--tokens of at most {longest}"
            )
    if against is not None:
        require_same_folders(model, against)
    return _Asked(prompt, tokens, threads, str(where), str(arithmetic).removeprefix("torch."), sys.executable)


def _in_transformers(model: Path, against: Path | None, asked: _Asked) -> list[Contender]:
    command = (asked.python, "-m", __name__)
    request: dict[str, Any] = {"prompt": asked.prompt, "tokens": asked.tokens, "threads": asked.threads}
    request |= {"device": asked.device, "dtype": asked.dtype}
    pair = [("model", model), *([] if against is None else [("original", against)])]
    return [Contender(role, str(path), command, {**request, "model": str(path)}) for role, path in pair]


def _in_llama_cpp(
    model: Path, against: Path | None, asked: _Asked, stack: ExitStack, listener: Listener
) -> list[Contender]:
    command = (asked.python, llamacpp_speed.__file__)
    request: dict[str, Any] = {"prompt": asked.prompt, "tokens": asked.tokens, "threads": asked.threads}
    request["library"] = asked.library
    files = [("model", model, model)]
    if against is not None:
        require_same_in_files(model, against)
        files.append(("original", against, _as_gguf(against, stack, listener)))
    return [Contender(role, str(name), command, {**request, "model": str(file)}) for role, name, file in files]


def _as_gguf(against: Path, stack: ExitStack, listener: Listener) -> Path:
    """The original as a file: itself, or what an unquantized folder becomes in F16, for as long as ``stack`` lives."""
    if not against.is_dir():
        require_gguf(against)
        return against
    if open_checkpoint(against).config.get(CONFIG) is not None:
        raise CheckpointError(
            f"--against {against} is quantized; name the original, or write it with bitwright export {against} "
            "--format gguf --output FILE.gguf and name that file"
        )
    file = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bitwright-bench-")), "original-f16.gguf")
    export(against, file, format="gguf", embeddings="f16", listener=listener)
    return file


def _llama_cpp(python: Path | str | None, library: Path | str | None) -> tuple[str, str | None]:
    """An interpreter, and the llama.cpp that it shall load: a library, or None for its xllamacpp. Raises UserError."""
    if library is None:
        return _with_xllamacpp(python), None
    if python is not None:
        raise RecipeError(f"--library {library} needs no xllamacpp; leave --python {python} out")
    ran = subprocess.run(
        [sys.executable, llamacpp_speed.__file__, str(library)], capture_output=True, text=True, errors="replace"
    )
    if ran.returncode:
        raise UserError(
            f"--library {library} is no llama.cpp that can be measured: {ran.stderr.strip()[-500:]}; name the "
            "libllama.so (.dylib, .dll) of a build with -DBUILD_SHARED_LIBS=ON"
        )
    return sys.executable, str(Path(library).resolve())


def _with_xllamacpp(python: Path | str | None) -> str:
    """An interpreter that has xllamacpp. Raises UserError."""
    if python is None:
        if importlib.util.find_spec("xllamacpp") is None:
            raise UserError(
                "engine llama.cpp needs the package xllamacpp, which is not installed here: pip install "
                "'bitwright[llamacpp]', or give --python INTERPRETER of an environment that has it"
            )
        return sys.executable
    look = [str(python), "-c", "import xllamacpp"]
    try:
        ran = subprocess.run(look, capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"--python {python} cannot be run: {error.strerror}; name a Python interpreter") from None
    if ran.returncode:
        raise UserError(
            f"--python {python} cannot import xllamacpp ({ran.stderr.strip().splitlines()[-1:]}); install it there: "
            f"{python} -m pip install xllamacpp"
        )
    return str(python)


def _related(rows: list[Speed]) -> tuple[float, ...]:
    if len(rows) < 2:
        return ()
    model, original = rows
    return (
        model.weight_bytes / original.weight_bytes,
        model.peak_bytes / original.peak_bytes,
        model.tokens_per_second / original.tokens_per_second,
        model.prompt_tokens_per_second / original.prompt_tokens_per_second,
    )


def _measure_here(request: str, result: str) -> None:
    """What a process of ``bench`` does: loads a folder, runs it, writes down what it took."""
    asked: dict[str, Any] = json.loads(Path(request).read_text())
    torch.set_num_threads(asked["threads"])
    try:
        model = load(asked["model"], device=asked["device"], dtype=asked["dtype"])
    except UserError as error:
        raise SystemExit(str(error)) from None
    found = time_model(model, asked["prompt"], asked["tokens"])
    runner = f"transformers {version('transformers')}, torch {version('torch')}"
    Path(result).write_text(json.dumps(found | {"version": runner}))


if __name__ == "__main__":
    _measure_here(*sys.argv[1:])
