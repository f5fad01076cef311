"""A long text to tokens, piece by piece: at once, a tokenizer takes some 200 times the memory of the text."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

PIECE, OVERLAP = 2**16, 2**12
"""Characters."""
AROUND = 16
"""Tokens on each side of a seam that have to agree."""


def tokens_of(
    text: str, encode: Callable[[str], Sequence[int]], *, piece: int = PIECE, overlap: int = OVERLAP
) -> Int[Tensor, " M"]:
    """What ``encode`` makes of the whole text.

    Each piece begins ``overlap`` characters before the former one ends. The overlap alone tells how many tokens it has;
    in its middle, where neither end of a piece is near, the two are joined if they and the overlap alone have the same
    tokens there. Where they have not, the whole text is encoded at once.
    """
    found, stop = list[Tensor](), piece
    last, start = encode(text[:stop]), 0
    while stop < len(text):
        begin, end = stop - overlap, stop
        stop += piece
        between, following = encode(text[begin:end]), encode(text[begin:stop])
        seam = len(between) // 2
        end_of_last = len(last) - len(between) + seam
        if not _agree((last, end_of_last), (between, seam), (following, seam)) or end_of_last < start:
            return torch.tensor(encode(text), dtype=torch.int64)
        found.append(torch.tensor(last[start:end_of_last], dtype=torch.int64))
        last, start = following, seam
    return torch.cat([*found, torch.tensor(last[start:], dtype=torch.int64)])


def _agree(*seams: tuple[Sequence[int], int]) -> bool:
    """Whether all have the same tokens around a place in each."""
    around = [list(tokens[max(0, at - AROUND) : max(0, at + AROUND)]) for tokens, at in seams]
    return all(len(one) == 2 * AROUND and one == around[0] for one in around)
