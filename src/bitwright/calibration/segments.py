"""Tokens to calibration segments."""

import hashlib

import torch
from jaxtyping import Int
from torch import Tensor

from bitwright.core.errors import CalibrationError

SEEDS = 2**63


def segments(tokens: Int[Tensor, " M"], samples: int, seqlen: int, seed: int, source: str) -> Int[Tensor, "N T"]:
    """``samples`` segments of ``seqlen`` tokens, drawn without repetition from consecutive windows of the text.

    The same tokens and seed give the same segments. Raises CalibrationError where the text is too short.
    """
    if seed >= SEEDS:
        raise CalibrationError(f"seed {seed} is more than torch's generator takes; it must be below {SEEDS}")
    needed = samples * seqlen
    if len(tokens) < needed:
        raise CalibrationError(
            f"{samples} segments of {seqlen} tokens need {needed} tokens, but '{source}' has {len(tokens)}; "
            + ", or ".join(["take a longer text", *_shorter(len(tokens), samples, seqlen)])
        )
    windows = tokens[: len(tokens) // seqlen * seqlen].view(-1, seqlen)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:samples]]


def _shorter(tokens: int, samples: int, seqlen: int) -> list[str]:
    """What the text would be long enough for."""
    fewer = [f"--samples {tokens // seqlen}"] if tokens >= seqlen else []
    return fewer + ([f"--seqlen {tokens // samples}"] if tokens >= samples else [])


def fingerprint(tokens: Int[Tensor, "N T"]) -> str:
    """SHA-256 of the segments, as little-endian int64 in row-major order."""
    return hashlib.sha256(tokens.to(torch.int64).numpy().astype("<i8").tobytes()).hexdigest()
