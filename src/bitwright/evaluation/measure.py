"""Measure the perplexity of a model, and its divergence from the original, on consecutive windows of a text."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from bitwright.core.errors import CalibrationError
from bitwright.core.progress import Listener, Progress


@dataclass(frozen=True)
class Measurement:
    """The result over ``windows`` windows of ``seqlen`` tokens.

    ``perplexity`` is exp of the mean negative log-likelihood of every token but the first of each window.
    ``kl_divergence`` is the mean over all positions of KL(reference || model) in nats. ``top1_agreement`` is the share
    of positions at which both models rank the same token first. Both are None without a reference.
    """

    windows: int
    seqlen: int
    perplexity: float
    reference_perplexity: float | None = None
    kl_divergence: float | None = None
    top1_agreement: float | None = None


def consecutive(tokens: Int[Tensor, " M"], seqlen: int, windows: int | None, source: str) -> Int[Tensor, "W T"]:
    """The first ``windows`` windows of ``seqlen`` tokens, or all; they do not overlap, as in the papers.

    Raises CalibrationError if the text has fewer windows.
    """
    if seqlen < 2:
        raise CalibrationError(f"windows of {seqlen} tokens predict nothing; --seqlen must be at least 2")
    if windows is not None and windows < 1:
        raise CalibrationError(f"{windows} windows asked for; --windows must be at least 1")
    available = len(tokens) // seqlen
    if available < (windows or 1):
        needed = (windows or 1) * seqlen
        raise CalibrationError(
            f"{windows or 1} windows of {seqlen} tokens need {needed} tokens, but '{source}' has {len(tokens)}, "
            f"enough for {available}; take a longer text, fewer --windows, or a shorter --seqlen"
        )
    count = windows or available
    return tokens[: count * seqlen].view(count, seqlen)


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    windows: Int[Tensor, "W T"],
    reference: PreTrainedModel | None = None,
    *,
    listener: Listener,
) -> Measurement:
    """Run the windows one by one through the model and, if given, the reference."""
    totals = torch.zeros(4, dtype=torch.float64)
    for done, window in enumerate(windows):
        listener(Progress("evaluate", done, len(windows), "windows"))
        logits = _logits(model, window)
        expected = None if reference is None else _logits(reference, window)
        totals += _sums(logits, expected, window)
    listener(Progress("evaluate", len(windows), len(windows), "windows"))
    count, seqlen = windows.shape
    loss, reference_loss, divergence, agreement = totals.tolist()
    predicted, positions = count * (seqlen - 1), count * seqlen
    if reference is None:
        return Measurement(count, seqlen, _exp(loss / predicted))
    return Measurement(
        windows=count,
        seqlen=seqlen,
        perplexity=_exp(loss / predicted),
        reference_perplexity=_exp(reference_loss / predicted),
        kl_divergence=divergence / positions,
        top1_agreement=agreement / positions,
    )


def _logits(model: PreTrainedModel, window: Int[Tensor, " T"]) -> Float[Tensor, "T V"]:
    logits: Tensor = model(window[None].to(model.device), use_cache=False).logits[0]
    return logits.float()


def _sums(
    logits: Float[Tensor, "T V"], expected: Float[Tensor, "T V"] | None, window: Int[Tensor, " T"]
) -> Float[Tensor, " 4"]:
    """The sums over a window: loss, the reference's loss, divergence, agreements."""
    targets = window[1:].to(logits.device)
    log_q = F.log_softmax(logits, dim=-1)
    loss = F.nll_loss(log_q[:-1], targets, reduction="sum").double()
    if expected is None:
        return torch.tensor([float(loss), 0.0, 0.0, 0.0], dtype=torch.float64)
    log_p = F.log_softmax(expected, dim=-1).to(log_q.device)
    reference_loss = F.nll_loss(log_p[:-1], targets, reduction="sum").double()
    divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).double().sum()
    agreement = (logits.argmax(-1) == log_p.argmax(-1)).double().sum()
    return torch.tensor([float(loss), float(reference_loss), float(divergence), float(agreement)], dtype=torch.float64)


def _exp(mean_loss: float) -> float:
    return math.exp(mean_loss) if mean_loss < 700 else math.inf
