"""Tokenize long texts, and take the digest of tokens."""

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


def fingerprint(tokens: Int[Tensor, "N T"]) -> str:
    """The SHA-256 of segments, as little-endian int64 in row-major order."""
    return hashlib.sha256(tokens.to(torch.int64).numpy().astype("<i8").tobytes()).hexdigest()
