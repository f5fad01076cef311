"""Measure the perplexity of a model, and its divergence from the original, on consecutive windows of a text."""

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from bitwright.core.errors import CalibrationError
from bitwright.core.progress import Listener, Progress

IGNORED = -100
"""The target that torch's loss leaves out."""
MODEL, PAPERS = "model", "papers"
"""The protocols: each window as the model was trained to see text; or one stream of tokens, cut into windows."""


@dataclass(frozen=True)
class Measurement:
    """The result over ``windows`` windows of ``seqlen`` tokens.

    ``perplexity`` is exp of the mean negative log-likelihood of every token but the first of each window, and but the
    tokens of ``begins_with``, which the tokenizer puts in front of every text, and which stand in front of each window
    by the ``protocol`` "model". It is None if the tokenizer puts none there, and by the protocol "papers".
    ``kl_divergence`` is the mean over all positions of KL(reference || model) in nats. ``top1_agreement`` is the share
    of positions at which both models rank the same token first. Both are None without a reference.
    """

    windows: int
    seqlen: int
    perplexity: float
    reference_perplexity: float | None = None
    kl_divergence: float | None = None
    top1_agreement: float | None = None
    protocol: str = MODEL
    begins_with: str | None = None


def consecutive(tokens: Int[Tensor, " M"], seqlen: int, windows: int | None, source: str) -> Int[Tensor, "W T"]:
    """The first ``windows`` windows of ``seqlen`` tokens, or all; they do not overlap, as in the papers.

    Raises CalibrationError if the text has fewer windows.
    """
    require_windows(seqlen, windows)
    available = len(tokens) // seqlen
    if available < (windows or 1):
        needed = (windows or 1) * seqlen
        raise CalibrationError(
            f"{windows or 1} windows of {seqlen} tokens need {needed} tokens, but '{source}' has {len(tokens)}, "
            f"enough for {available}; take a longer text, fewer --windows, or a shorter --seqlen"
        )
    count = windows or available
    return tokens[: count * seqlen].view(count, seqlen)


def require_windows(seqlen: int, windows: int | None) -> None:
    """Raise CalibrationError for windows in which nothing is predicted, and for none."""
    if seqlen < 2:
        raise CalibrationError(f"windows of {seqlen} tokens predict nothing; --seqlen must be at least 2")
    if windows is not None and windows < 1:
        raise CalibrationError(f"{windows} windows asked for; --windows must be at least 1")


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    windows: Int[Tensor, "W T"],
    reference: PreTrainedModel | None = None,
    *,
    beginning: Collection[int] = (),
    listener: Listener,
) -> Measurement:
    """Run the windows one by one through the model and, if given, the reference.

    The tokens of ``beginning`` are not among those whose likelihood is measured.
    """
    totals, targets = torch.zeros(4, dtype=torch.float64), _targets(windows, beginning)
    if not (predicted := int((targets != IGNORED).sum())):
        raise CalibrationError("the text holds nothing but tokens that begin a text, so nothing in it can be predicted")
    for done, window in enumerate(windows):
        listener(Progress("evaluate", done, len(windows), "windows"))
        logits = _logits(model, window)
        expected = None if reference is None else _logits(reference, window)
        totals += _sums(logits, expected, targets[done])
    listener(Progress("evaluate", len(windows), len(windows), "windows"))
    count, seqlen = windows.shape
    loss, reference_loss, divergence, agreement = totals.tolist()
    positions = count * seqlen
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


def _targets(windows: Int[Tensor, "W T"], beginning: Collection[int]) -> Int[Tensor, "W T-1"]:
    """The tokens whose likelihood is measured, ``IGNORED`` in the place of the others."""
    targets = windows[:, 1:]
    return targets.masked_fill(torch.isin(targets, torch.tensor(list(beginning), dtype=torch.int64)), IGNORED)


def _logits(model: PreTrainedModel, window: Int[Tensor, " T"]) -> Float[Tensor, "T V"]:
    logits: Tensor = model(window[None].to(model.device), use_cache=False).logits[0]
    return logits.float()


def _sums(
    logits: Float[Tensor, "T V"], expected: Float[Tensor, "T V"] | None, targets: Int[Tensor, " T-1"]
) -> Float[Tensor, " 4"]:
    """The sums over a window: loss, the reference's loss, divergence, agreements."""
    targets = targets.to(logits.device)
    log_q = F.log_softmax(logits, dim=-1)
    loss = F.nll_loss(log_q[:-1], targets, reduction="sum", ignore_index=IGNORED).double()
    if expected is None:
        return torch.tensor([float(loss), 0.0, 0.0, 0.0], dtype=torch.float64)
    log_p = F.log_softmax(expected, dim=-1).to(log_q.device)
    reference_loss = F.nll_loss(log_p[:-1], targets, reduction="sum", ignore_index=IGNORED).double()
    divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).double().sum()
    agreement = (logits.argmax(-1) == log_p.argmax(-1)).double().sum()
    return torch.tensor([float(loss), float(reference_loss), float(divergence), float(agreement)], dtype=torch.float64)


def _exp(mean_loss: float) -> float:
    return math.exp(mean_loss) if mean_loss < 700 else math.inf
