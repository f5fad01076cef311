"""The agreement of a client with what it should compute: tokens, logits, perplexity, and the verdict."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

LOGITS = 0.1
"""The distance of logits that passes, in standard deviations of the expected ones over the vocabulary."""
PERPLEXITY = 0.5
"""The difference of perplexities that passes, in per cent."""


@dataclass(frozen=True)
class Expected:
    """The outputs of a model in float32: greedy tokens after a prompt, the logits of each, and the losses of windows.

    A window's loss is the mean negative log-likelihood in nats of its tokens but the first.
    """

    tokens: list[int]
    logits: Float[Tensor, "N V"]
    nll: list[float]


def expected(model: Any, prompt: Sequence[int], count: int, windows: Sequence[Sequence[int]]) -> Expected:
    """Compute the expected outputs of a causal language model of transformers' interface, without a cache."""
    tokens, rows = list(prompt), []
    with torch.inference_mode():
        for _ in range(count):
            rows.append(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].float())
            tokens.append(int(rows[-1].argmax()))
        losses = [_loss(model, torch.tensor(window)) for window in windows]
    return Expected(tokens[len(prompt) :], torch.stack(rows), losses)


def _loss(model: Any, window: Tensor) -> float:
    logits = model(window[None], use_cache=False).logits[0].float()
    return float(torch.nn.functional.cross_entropy(logits[:-1], window[1:]))


def compared(wanted: Expected, result: dict[str, Any]) -> dict[str, Any]:
    """Compare a client's result (``clients/client.py``) with what is expected.

    ``alike`` counts greedy tokens before the first that differs. ``behind`` says by how much the client's token there
    is less likely than ours, ``logits`` is the largest difference after the prompt, both in standard deviations of our
    logits. ``perplexity`` is the relative difference in per cent. None means that nothing differs, or that the client
    gives no logits. Raises ValueError for a result of another shape.
    """
    tokens, nll, logits = result["tokens"], result["nll"], result.get("logits")
    if len(tokens) != len(wanted.tokens) or len(nll) != len(wanted.nll):
        raise ValueError(
            f"{len(wanted.tokens)} tokens and {len(wanted.nll)} windows were asked for; the client gave {len(tokens)} "
            f"and {len(nll)}"
        )
    alike = next((n for n, token in enumerate(wanted.tokens) if token != tokens[n]), len(tokens))
    ours, theirs = (math.exp(sum(losses) / len(losses)) for losses in (wanted.nll, nll))
    return {
        "alike": alike,
        "of": len(tokens),
        "behind": _behind(wanted, tokens, alike) if alike < len(tokens) else None,
        "logits": None if logits is None else _apart(wanted.logits[0], logits),
        "expected_perplexity": ours,
        "client_perplexity": theirs,
        "perplexity": 100 * (theirs / ours - 1),
    }


def _behind(wanted: Expected, tokens: Sequence[int], place: int) -> float:
    """The difference in likelihood of the client's token and ours where they first differ, after equal tokens."""
    row = wanted.logits[place]
    return float((row[wanted.tokens[place]] - row[tokens[place]]) / row.std())


def _apart(ours: Float[Tensor, " V"], theirs: Sequence[float]) -> float:
    if len(theirs) != len(ours):
        raise ValueError(f"the model has {len(ours)} logits, and the client gave {len(theirs)}")
    return float((ours.double() - torch.tensor(theirs, dtype=torch.float64)).abs().max() / ours.std())


def verdict(comparison: dict[str, Any]) -> str:
    """The verdict: "passes", or what a client fails by.

    Greedy tokens are all alike, or logits agree within ``LOGITS`` (of a client without logits: the first other token
    is that little less likely); and perplexities within ``PERPLEXITY``.
    """
    apart = comparison["behind"] if comparison["logits"] is None else comparison["logits"]
    failed = []
    if comparison["alike"] < comparison["of"] and not apart <= LOGITS:
        failed.append("tokens")
    if not abs(comparison["perplexity"]) <= PERPLEXITY:
        failed.append("perplexity")
    return f"fails: {', '.join(failed)}" if failed else "passes"
