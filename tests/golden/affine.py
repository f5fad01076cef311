"""The affine formula a second time, independent of Bitwright: numpy, float64, a loop over tiles.

Written from OmniQuant (arXiv 2308.13137, eq. 2 at gamma = beta = 1):

    h = (max - min) / (2^N - 1),   z = -round(min / h),   W_q = clamp(round(W / h) + z, 0, 2^N - 1)

with ranges that contain zero, and h rounded to the dtype it is stored in before anything is made of it. Symmetric:
the range is [-r, r], r = max |W|, on the same number of steps; z = 0, codes are signed. Nothing here uses torch for
arithmetic: bfloat16, float16 and float32 are rounded to by what defines them, their digits and smallest exponent.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

# Binary digits of the significand, and the exponent of the smallest normal number.
FORMATS = {"bfloat16": (8, -126), "float16": (11, -14), "float32": (24, -126)}


@dataclass(frozen=True)
class Golden:
    """Codes [O, I], scales and zero points (0 where symmetric) [P, Q], and the tile's rows and columns."""

    codes: Array
    scale: Array
    zero: Array
    rows: int
    columns: int

    def values(self, dtype: str) -> Array:
        """``(code - zero) * scale``: one product, rounded once to ``dtype``."""
        zero, scale = (each.repeat(self.rows, 0).repeat(self.columns, 1) for each in (self.zero, self.scale))
        return rounded((self.codes - zero) * scale, dtype)


def rounded(values: Array, dtype: str) -> Array:
    """float64 values to the nearest of a narrower format, ties to even; what is too large is not told apart."""
    digits, smallest = FORMATS[dtype]
    exponent = np.maximum(np.frexp(values)[1] - 1, smallest)
    quantum = np.ldexp(1.0, exponent - (digits - 1))
    nearest: Array = np.rint(values / quantum) * quantum
    return nearest


def quantize(
    weight: Array, bits: int, symmetric: bool, tile: tuple[int, int], dtype: str, scale: Array | None = None
) -> Golden:
    """What the formula makes of a float64 weight [O, I] in tiles of so many rows and columns; -1 is all of them.

    ``scale`` [P, Q] replaces h, for float32 scales, where the last digit depends on the order of two operations.
    """
    rows, columns = (whole if asked == -1 else asked for asked, whole in zip(tile, weight.shape, strict=True))
    p, q = weight.shape[0] // rows, weight.shape[1] // columns
    codes, scales, zeros = np.zeros(weight.shape, int), np.ones((p, q)), np.zeros((p, q), int)
    for i in range(p):
        for j in range(q):
            part = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            h = None if scale is None else scale[i, j]
            codes[part], scales[i, j], zeros[i, j] = _one_tile(weight[part], bits, symmetric, dtype, h)
    return Golden(codes, scales, zeros, rows, columns)


def _one_tile(weight: Array, bits: int, symmetric: bool, dtype: str, h: float | None) -> tuple[Array, float, int]:
    steps = 2**bits - 1
    low, high = min(weight.min(), 0.0), max(weight.max(), 0.0)
    if symmetric:
        high = max(-low, high)
        low = -high
    if h is None:
        h = float(rounded(np.array((high - low) / steps), dtype)) if high > low else 1.0
    # Quotients as float32 has them: the nearest float32 to the true one.
    ratio = weight.astype(np.float32) / np.float32(h)
    if symmetric:
        return np.clip(np.rint(ratio), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype(int), h, 0
    zero = int(np.clip(-np.rint(np.float32(low) / np.float32(h)), 0, steps))
    return np.clip(np.rint(ratio) + zero, 0, steps).astype(int), h, zero
