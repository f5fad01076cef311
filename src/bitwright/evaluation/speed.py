"""Speed and memory, measured so that two models compare: each in fresh processes, in turn, over several rounds.

What else the machine does meanwhile then falls on both. ``time_model`` is what a process does with a torch model;
``llamacpp_speed`` is the same for llama.cpp.
"""

import json
import subprocess
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

from bitwright.core.errors import UserError
from bitwright.core.progress import Listener, Progress
from bitwright.evaluation.llamacpp_speed import REFUSED, peak_resident

SAID = 2000  # characters of what a failed process wrote, from the end


@dataclass(frozen=True)
class Speed:
    """What a model needs and gives. Bytes; tokens per second, the median of the rounds, and each round's.

    ``weight_bytes`` are the weights as they lie in memory, ``peak_bytes`` the most that the process (on a GPU: its
    tensors there) had at once.
    """

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
    """A model to be measured: its role in the table, its name, the command of its process, and what that is asked.

    The command is called with two more arguments: a file that holds the request, and one to write the result into.
    """

    role: str
    model: str
    command: tuple[str, ...]
    request: Mapping[str, Any]


def measure_in_turn(contenders: Sequence[Contender], rounds: int, listener: Listener) -> tuple[list[Speed], str]:
    """Every contender once per round, each time in a process of its own, and the version of what ran them.

    Raises UserError with what the process said where one fails.
    """
    found: list[list[dict[str, Any]]] = [[] for _ in contenders]
    total = rounds * len(contenders)
    for n in range(total):
        which = n % len(contenders)
        listener(Progress("bench", n, total, f"round {n // len(contenders) + 1}", detail=contenders[which].role))
        found[which].append(_measured(contenders[which]))
    speeds = [_summed(contender, runs) for contender, runs in zip(contenders, found, strict=True)]
    return speeds, found[0][0]["version"]


def _measured(contender: Contender) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="bitwright-bench-") as folder:
        request, result = Path(folder, "request.json"), Path(folder, "result.json")
        request.write_text(json.dumps(dict(contender.request)))
        ran = subprocess.run([*contender.command, str(request), str(result)], capture_output=True)
        if ran.returncode or not result.is_file():
            raise UserError(_why(contender.model, ran.returncode, ran.stderr.decode(errors="replace").strip()[-SAID:]))
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def _why(model: str, code: int, said: str) -> str:
    if code == REFUSED:
        return said
    how = f"was ended by signal {-code}" if code < 0 else f"ended with {code}"
    memory = "\nIt was most likely out of memory; a smaller --prompt takes less" if code < 0 else ""
    return f"{model} could not be measured: its process {how}. It said:\n{said or 'nothing'}{memory}"


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


@torch.inference_mode()
def time_model(model: Any, prompt: int, tokens: int) -> dict[str, Any]:
    """What a transformers model on its device takes to read a prompt, and to generate from an empty context, greedily,
    at batch 1. Whether a token ends the text is not looked at.
    """
    vocabulary, device = int(model.config.vocab_size), model.device
    drawn = torch.randint(vocabulary, (1, prompt), generator=torch.Generator().manual_seed(0)).to(device)
    _greedy(model, drawn[:, :1], 2)  # the first pass touches every weight, and builds what is built lazily
    start = time.perf_counter()
    model(drawn, use_cache=True, logits_to_keep=1).logits.argmax(-1).tolist()  # read back, so that a GPU has finished
    asked = time.perf_counter() - start
    start = time.perf_counter()
    _greedy(model, drawn[:, :1], tokens)
    seconds = time.perf_counter() - start
    return {
        "weight_bytes": held_bytes(model),
        "peak_bytes": peak_bytes(device),
        "tokens_per_second": tokens / seconds,
        "prompt_tokens_per_second": prompt / asked,
    }


def _greedy(model: Any, given: Int[Tensor, "1 T"], count: int) -> None:
    past = None
    for _ in range(count):
        found = model(given, past_key_values=past, use_cache=True, logits_to_keep=1)
        past, given = found.past_key_values, found.logits[:, -1].argmax(-1, keepdim=True)
        given.tolist()  # a token is there when it can be read


def held_bytes(model: torch.nn.Module) -> int:
    """Bytes of parameters and buffers, those that are tied once."""
    held = {t.data_ptr(): t.nbytes for t in chain(model.parameters(), model.buffers()) if t.nbytes}
    return sum(held.values())


def peak_bytes(device: torch.device) -> int:
    """The most that tensors took on a GPU, or else the largest resident set since this program began."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return peak_resident()
