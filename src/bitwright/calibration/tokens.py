"""Tokenize text, and draw calibration segments from the tokens."""

import hashlib
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from bitwright.core.errors import CalibrationError

PIECE, OVERLAP = 2**16, 2**12
"""The length of a piece of text and of the overlap of two, in characters."""
LONGEST_WHOLE = 2**20
"""The longest text that is tokenized at once, in characters: it takes up to 700 MB."""
AROUND = 16
"""The number of tokens that must agree on each side of a joint."""
SEEDS = 2**63
"""The number of seeds that torch's generator accepts."""


def tokens_of(
    text: str, encode: Callable[[str], Sequence[int]], *, piece: int = PIECE, overlap: int = OVERLAP
) -> Int[Tensor, " M"]:
    """Tokenize a long text piece by piece; the result is what ``encode`` gives for the whole text.

    For a whole text, a tokenizer takes about 200 times the memory of the text. Each piece overlaps the one before it by
    ``overlap`` characters, and the overlap is also tokenized alone. If all three have equal tokens in the middle of the
    overlap, far from the ends of both pieces, the pieces are joined there. Otherwise the whole text is encoded at once.
    Raises CalibrationError if it is too long for that.
    """
    joined, stop = list[Tensor](), piece
    last, start = encode(text[:stop]), 0
    while stop < len(text):
        begin, end = stop - overlap, stop
        stop += piece
        between, following = encode(text[begin:end]), encode(text[begin:stop])
        seam = len(between) // 2
        end_of_last = len(last) - len(between) + seam
        if not _agree((last, end_of_last), (between, seam), (following, seam)) or end_of_last < start:
            if len(text) > LONGEST_WHOLE:
                raise CalibrationError(
                    f"the tokenizer gives other tokens for pieces of the text than for all of it (near character "
                    f"{begin:,}), and at once it tokenizes {LONGEST_WHOLE:,} characters at most; the text has "
                    f"{len(text):,}: take a part of it, or another one"
                )
            return torch.tensor(encode(text), dtype=torch.int64)
        joined.append(torch.tensor(last[start:end_of_last], dtype=torch.int64))
        last, start = following, seam
    return torch.cat([*joined, torch.tensor(last[start:], dtype=torch.int64)])


def _agree(*seams: tuple[Sequence[int], int]) -> bool:
    """Whether all sequences have equal tokens around their joints."""
    around = [list(tokens[max(0, at - AROUND) : max(0, at + AROUND)]) for tokens, at in seams]
    return all(len(tokens) == 2 * AROUND and tokens == around[0] for tokens in around)


def segments(tokens: Int[Tensor, " M"], samples: int, seqlen: int, seed: int, source: str) -> Int[Tensor, "N T"]:
    """Draw ``samples`` segments of ``seqlen`` tokens, without repetition, from consecutive windows of the data.

    Equal tokens and seeds give equal segments. Raises CalibrationError, which names the ``source``, if the data is too
    short.
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
    """The options with which the data would be long enough."""
    fewer = [f"--samples {tokens // seqlen}"] if tokens >= seqlen else []
    return fewer + ([f"--seqlen {tokens // samples}"] if tokens >= samples else [])


def fingerprint(tokens: Int[Tensor, "N T"]) -> str:
    """The SHA-256 of segments, as little-endian int64 in row-major order."""
    return hashlib.sha256(tokens.to(torch.int64).numpy().astype("<i8").tobytes()).hexdigest()
