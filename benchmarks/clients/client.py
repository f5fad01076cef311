"""The common part of the workers in this folder: their request, their result, and measuring a torch module.

A worker is ``NAME_worker.py MODEL REQUEST.json RESULT.json``, run by the interpreter of the client's own environment.
This file needs nothing but Python, and torch for ``measure_module``.
"""

import json
import os
import re
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from time import monotonic
from typing import Any


@dataclass(frozen=True)
class Request:
    """A request to measure the model in ``folder``.

    ``new_tokens`` tokens are chosen greedily after the token ids of ``prompt``, past an end-of-text token too. For
    every window the mean negative log-likelihood of its tokens but the first is wanted. ``dtype`` is that of the
    arithmetic, "auto" the client's own choice; ``options`` are the client's own.
    """

    folder: str
    result: str
    prompt: list[int]
    new_tokens: int = 32
    windows: list[list[int]] = field(default_factory=list)
    threads: int = 1
    dtype: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def given(cls) -> "Request":
        """The request that the command line names. Threads are set for libraries that are imported after this."""
        folder, request, result = sys.argv[1:4]
        asked = cls(folder, result, **json.loads(Path(request).read_text()))
        os.environ["OMP_NUM_THREADS"] = str(asked.threads)
        return asked

    def write(self, measured: dict[str, Any], *libraries: str, **more: Any) -> None:
        """Write the result, with versions and the most memory that this program has held."""
        versions = {name: version(name) for name in libraries}
        Path(self.result).write_text(json.dumps(measured | more | {"versions": versions, "peak_bytes": peak_bytes()}))


def peak_bytes() -> int:
    """The largest resident set of this program."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def measure_module(model: Any, request: Request) -> dict[str, Any]:
    """Tokens, losses, logits and speeds of a causal language model of transformers' interface.

    ``tokens_per_second`` counts the steps after the prompt, one token each; what is measured has run once before.
    """
    import torch

    torch.set_num_threads(request.threads)
    with torch.inference_mode():
        _generate(model, request.prompt, 2)
        tokens, logits, prompt_seconds, seconds = _generate(model, request.prompt, request.new_tokens)
        losses = [_loss(model, window) for window in request.windows]
    steps = len(tokens) - 1
    return {
        "tokens": tokens,
        "nll": losses,
        "logits": logits,
        "prompt_tokens_per_second": len(request.prompt) / prompt_seconds,
        "tokens_per_second": steps / seconds if steps else None,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _generate(model: Any, prompt: list[int], count: int) -> tuple[list[int], list[float], float, float]:
    """Chosen tokens, logits after the prompt, seconds for the prompt and for the rest."""
    import torch

    start = monotonic()
    output = model(torch.tensor([prompt]), use_cache=True)
    logits = output.logits[0, -1].float()
    tokens, begun = [int(logits.argmax())], monotonic()
    while len(tokens) < count:
        output = model(torch.tensor([tokens[-1:]]), past_key_values=output.past_key_values, use_cache=True)
        tokens.append(int(output.logits[0, -1].float().argmax()))
    return tokens, logits.tolist(), begun - start, monotonic() - begun


def _loss(model: Any, window: list[int]) -> float:
    import torch

    tokens = torch.tensor(window)
    logits = model(tokens[None], use_cache=False).logits[0].float()
    return float(torch.nn.functional.cross_entropy(logits[:-1], tokens[1:]))
