"""What the workers of this folder have in common: the request they are given, the result they leave, and how a model
that is a torch module is measured.

A worker is ``NAME_worker.py MODEL REQUEST.json RESULT.json``, run by the interpreter of the client's own environment.
Nothing here needs more than Python; torch where ``measure_module`` is called.
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
    """What to do with the model in ``folder``.

    From the token ids of ``prompt`` ``new_tokens`` tokens are chosen greedily, past an end-of-text token too; of every
    window the mean negative log-likelihood of its tokens but the first is wanted. ``dtype`` is that of the arithmetic,
    "auto" the client's own choice; ``options`` are the client's own.
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
        """The one named on the command line. Threads are set for libraries that are imported after this."""
        folder, request, result = sys.argv[1:4]
        found = cls(folder, result, **json.loads(Path(request).read_text()))
        os.environ["OMP_NUM_THREADS"] = str(found.threads)
        return found

    def write(self, measured: dict[str, Any], *libraries: str, **more: Any) -> None:
        """Writes the result, with versions and the most memory that this program has held."""
        versions = {name: version(name) for name in libraries}
        Path(self.result).write_text(json.dumps(measured | more | {"versions": versions, "peak_bytes": peak_bytes()}))


def peak_bytes() -> int:
    """The largest resident set of this program."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


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
    found = model(torch.tensor([prompt]), use_cache=True)
    logits = found.logits[0, -1].float()
    tokens, begun = [int(logits.argmax())], monotonic()
    while len(tokens) < count:
        found = model(torch.tensor([tokens[-1:]]), past_key_values=found.past_key_values, use_cache=True)
        tokens.append(int(found.logits[0, -1].float().argmax()))
    return tokens, logits.tolist(), begun - start, monotonic() - begun


def _loss(model: Any, window: list[int]) -> float:
    import torch

    tokens = torch.tensor(window)
    logits = model(tokens[None], use_cache=False).logits[0].float()
    return float(torch.nn.functional.cross_entropy(logits[:-1], tokens[1:]))
