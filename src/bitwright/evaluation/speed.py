"""Measure speed and memory of two models fairly: in fresh processes, in turn, over several rounds.

So other work on the machine affects both. ``time_model`` is run in a process with a torch model; ``llamacpp_speed`` is
the equivalent for llama.cpp.
"""

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from bitwright.core import child_process
from bitwright.core.errors import UserError
from bitwright.core.progress import Listener, Progress
from bitwright.evaluation.llamacpp_speed import REFUSED, peak_resident
from bitwright.model.config import text_config_of

ERROR_CHARACTERS = 2000  # the end of a failed process's output that is shown


@dataclass(frozen=True)
class Speed:
    """The memory of a model in bytes and its speed in tokens per second: the median of the rounds, and each round."""

    role: str
    model: str
    weight_bytes: int
    peak_bytes: int
    tokens_per_second: float
    prompt_tokens_per_second: float
    tokens_per_second_each: tuple[float, ...]
    prompt_tokens_per_second_each: tuple[float, ...]


@dataclass(frozen=True)
class Contender:
    """A model to be measured: its role in the table, its name, the command of its process, and the request to it.

    The command is called with two more arguments: a file that holds the request, and one to write the result into.
    ``other`` is True if it is the command of another Python than this one.
    """

    role: str
    model: str
    command: tuple[str, ...]
    request: Mapping[str, Any]
    other: bool = False


def measure_in_turn(contenders: Sequence[Contender], rounds: int, listener: Listener) -> tuple[list[Speed], str]:
    """Measure every contender once per round, each time in its own process; return the speeds and the engine's version.

    Raises UserError with the output of a process that fails.
    """
    results: list[list[dict[str, Any]]] = [[] for _ in contenders]
    total = rounds * len(contenders)
    for n in range(total):
        which = n % len(contenders)
        listener(Progress("bench", n, total, f"round {n // len(contenders) + 1}", detail=contenders[which].role))
        results[which].append(_measured(contenders[which]))
    speeds = [_summed(contender, runs) for contender, runs in zip(contenders, results, strict=True)]
    return speeds, results[0][0]["version"]


def _measured(contender: Contender) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="bitwright-bench-") as folder:
        request, result = Path(folder, "request.json"), Path(folder, "result.json")
        request.write_text(json.dumps(dict(contender.request)))
        process = child_process.run((*contender.command, str(request), str(result)), contender.other)
        if process.returncode or not result.is_file():
            output = process.stderr.decode(errors="replace").strip()[-ERROR_CHARACTERS:]
            raise UserError(_failure(contender.model, process.returncode, output))
        measured: dict[str, Any] = json.loads(result.read_text())
        return measured


def _failure(model: str, code: int, output: str) -> str:
    if code == REFUSED:
        return output
    how = f"was ended by signal {-code}" if code < 0 else f"ended with {code}"
    memory = "\nIt was most likely out of memory; a smaller --prompt takes less" if code < 0 else ""
    return f"{model} could not be measured: its process {how}. It said:\n{output or 'nothing'}{memory}"


def _summed(contender: Contender, runs: Sequence[Mapping[str, Any]]) -> Speed:
    generated = tuple(run["tokens_per_second"] for run in runs)
    read = tuple(run["prompt_tokens_per_second"] for run in runs)
    return Speed(
        role=contender.role,
        model=contender.model,
        weight_bytes=runs[0]["weight_bytes"],
        peak_bytes=int(median(run["peak_bytes"] for run in runs)),
        tokens_per_second=median(generated),
        prompt_tokens_per_second=median(read),
        tokens_per_second_each=generated,
        prompt_tokens_per_second_each=read,
    )


@torch.no_grad()
def time_model(model: Any, prompt: int, tokens: int) -> dict[str, Any]:
    """Time a transformers model on its device: reading a prompt, then generating greedily from an empty context.

    The batch has one text. A token that ends the text does not end the generation.
    """
    vocabulary, device = int(text_config_of(model.config).vocab_size), model.device
    text = torch.randint(vocabulary, (1, prompt), generator=torch.Generator().manual_seed(0)).to(device)
    _greedy(model, text[:, :1], 2)  # warm-up: the first pass reads every weight, and makes what is made lazily
    start = time.perf_counter()
    model(text, use_cache=True, logits_to_keep=1).logits.argmax(-1).tolist()  # read back, which waits for a GPU
    prompt_seconds = time.perf_counter() - start
    start = time.perf_counter()
    _greedy(model, text[:, :1], tokens)
    seconds = time.perf_counter() - start
    return {
        "weight_bytes": held_bytes(model),
        "peak_bytes": peak_bytes(device),
        "tokens_per_second": tokens / seconds,
        "prompt_tokens_per_second": prompt / prompt_seconds,
    }


def _greedy(model: Any, tokens: Int[Tensor, "1 T"], count: int) -> None:
    past = None
    for _ in range(count):
        output = model(tokens, past_key_values=past, use_cache=True, logits_to_keep=1)
        past, tokens = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
        tokens.tolist()  # waits for a GPU


def held_bytes(model: torch.nn.Module) -> int:
    """The size of parameters and buffers in bytes; tied ones count once."""
    held = {t.data_ptr(): t.nbytes for t in chain(model.parameters(), model.buffers()) if t.nbytes}
    return sum(held.values())


def peak_bytes(device: torch.device) -> int:
    """The peak memory of tensors on a GPU, or else the largest resident set since this program began, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return peak_resident()
