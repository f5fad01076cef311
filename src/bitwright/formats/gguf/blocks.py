"""The blocks that GGUF keeps weights in: 32 numbers of a row with what they share, one after the other.

    Q4_0   d, then 16 bytes                   W = (n - 8) d            18 bytes    levels -8 to 7
    Q4_1   d, m, then 16 bytes                W = n d + m              20 bytes    levels  0 to 15
    Q8_0   d, then 32 bytes, signed           W = n d                  34 bytes    levels -128 to 127

d and m are float16; of 16 bytes, byte i has number i in its lower half and number i + 16 in its upper one. Other types,
super-blocks with scales of their own among them, are further rows of ``KINDS`` and further functions here.
Letters: O output features, I input features, B = I / 32 blocks of a row.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from jaxtyping import Bool, Float, Float16, Int
from torch import Tensor

BLOCK = 32
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Block:
    """The bytes of a block, and the lowest and the highest level of its numbers."""

    nbytes: int
    lowest: int
    highest: int


KINDS = {Kind.Q4_0: Block(18, -8, 7), Kind.Q4_1: Block(20, 0, 15), Kind.Q8_0: Block(34, -128, 127)}


SCALES = {
    Kind.Q4_0: (0, 1), Kind.Q4_1: (0, 2), Kind.Q5_0: (0, 1), Kind.Q5_1: (0, 2), Kind.Q8_0: (0, 1),
    Kind.Q2_K: (80, 2), Kind.Q3_K: (108, 1), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208, 1),
    Kind.IQ4_NL: (0, 1), Kind.IQ4_XS: (0, 1),
}  # fmt: skip
"""The byte at which the float16 numbers of a block begin, and their number; also for types that are only read."""


def nbytes_of(shape: tuple[int, ...], kind: Kind) -> int:
    """The bytes of a tensor of this shape; its last dimension is that of rows."""
    count = int(np.prod(shape))
    if kind in KINDS:
        return count // BLOCK * KINDS[kind].nbytes
    return count * {Kind.F32: 4, Kind.F16: 2}[kind]


def packed(
    levels: Int[Tensor, "O I"], d: Float16[Tensor, "O B"], m: Float16[Tensor, "O B"] | None, kind: Kind
) -> Bytes:
    """Pack rows of blocks [O, bytes]; levels are as in the table above, within their bounds."""
    rows, blocks = d.shape
    out = np.empty((rows, blocks, KINDS[kind].nbytes), np.uint8)
    halves = [d] if m is None else [d, m]
    shared = [half.contiguous().numpy().view(np.uint8).reshape(rows, blocks, 2) for half in halves]
    start = 2 * len(shared)
    out[..., :start] = np.concatenate(shared, -1)
    numbers = levels.to(torch.int8).numpy().view(np.uint8).reshape(rows, blocks, BLOCK)
    if kind is Kind.Q8_0:
        out[..., start:] = numbers
    else:
        numbers = numbers - np.uint8(KINDS[kind].lowest % 256)  # wraps round
        out[..., start:] = numbers[..., :16] | numbers[..., 16:] << 4
    return out.reshape(rows, -1)


def unpacked(data: Bytes, kind: Kind) -> "Fitted":
    """Unpack rows of blocks that ``packed`` makes, into levels, d and m."""
    own, rows = KINDS[kind], len(data)
    blocks = data.reshape(rows, -1, own.nbytes)
    start = 4 if kind is Kind.Q4_1 else 2
    shared = torch.from_numpy(blocks[..., :start].copy().view(np.float16))
    numbers = blocks[..., start:].copy()
    if kind is Kind.Q8_0:
        levels = numbers.view(np.int8)
    else:
        levels = np.concatenate([numbers & 15, numbers >> 4], -1).view(np.int8) + np.int8(own.lowest)
    d, m = shared[..., 0].contiguous(), shared[..., 1].contiguous() if kind is Kind.Q4_1 else None
    return torch.from_numpy(levels).reshape(rows, -1), d, m


def valued(
    levels: Int[Tensor, "O I"], d: Float16[Tensor, "O B"], m: Float16[Tensor, "O B"] | None
) -> Float[Tensor, "O I"]:
    """The weights that blocks stand for, in float32."""
    weights = levels.view(*d.shape, BLOCK).float() * d.float()[..., None]
    if m is not None:
        weights += m.float()[..., None]
    return weights.view(levels.shape)


Fitted = tuple[Int[Tensor, "O I"], Float16[Tensor, "O B"], Float16[Tensor, "O B"] | None]
"""Levels, d and m."""
SHARES = (1.0, 0.975, 0.95, 0.925, 0.9, 0.875, 0.85, 0.8, 0.75, 0.7)
"""The shares of a block's range that are tried if weights are quantized anew in four bits."""


def nearest(weight: Float[Tensor, "O I"], kind: Kind) -> Fitted:
    """The weight in blocks: rounded to nearest within min-max in Q8_0, else within the best of ``SHARES``."""
    tiles = weight.float().view(len(weight), -1, BLOCK)
    if kind is Kind.Q8_0:
        return _rounded(tiles, tiles.abs().amax(-1) / KINDS[kind].highest, None, kind)
    low, high = tiles.amin(-1).clamp(max=0), tiles.amax(-1).clamp(min=0)
    best: Fitted | None = None
    least = torch.full_like(low, torch.inf)
    for share in SHARES:
        for d, m in _candidates(low * share, high * share, kind):
            tried = _rounded(tiles, d, m, kind)
            lost = (valued(*tried).view(tiles.shape) - tiles).square().sum(-1)
            best = tried if best is None else chosen(tried, best, lost < least)
            least = torch.minimum(lost, least)
    assert best is not None
    return best


def _candidates(low: Tensor, high: Tensor, kind: Kind) -> list[tuple[Tensor, Tensor | None]]:
    """Candidates for d and m: in Q4_0 the further end is at the lowest level, -8, or both ends are within level 7."""
    if kind is Kind.Q4_1:
        return [((high - low) / 15, low)]
    far = torch.where(-low > high, low, high)
    return [(far / -8, None), (far.abs() / 7, None)]


def _rounded(tiles: Float[Tensor, "O B 32"], d: Tensor, m: Tensor | None, kind: Kind) -> Fitted:
    """The nearest levels to the weights, for d and m as they are stored."""
    d, m = d.half(), None if m is None else m.half()
    shifted = tiles if m is None else tiles - m.float()[..., None]
    by = torch.where(d == 0, torch.ones_like(d), d).float()[..., None]
    lowest = -KINDS[kind].highest if kind is Kind.Q8_0 else KINDS[kind].lowest  # in Q8_0 both ends are alike
    levels = (shifted / by).round_().clamp_(lowest, KINDS[kind].highest)
    return levels.to(torch.int8).view(len(tiles), -1), d, m


def chosen(first: Fitted, second: Fitted, where: Bool[Tensor, "O B"]) -> Fitted:
    """Blocks of the first if ``where`` says so, else of the second."""
    wide = where.repeat_interleave(BLOCK, 1)
    m = None if first[2] is None or second[2] is None else first[2].where(where, second[2])
    return first[0].where(wide, second[0]), first[1].where(where, second[1]), m
