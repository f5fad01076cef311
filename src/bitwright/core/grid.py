"""Grids and tiles: which values a code stands for, how scales and zeros are kept, which weights share them.

none       W ~ code h                       symmetric integers
code       W ~ (code - z) h                 z an integer of the weight's own bits
product    W ~ code h + m,  m = -z h        the same z, but m is what is stored, rounded to float16 (GGUF's Q4_1)
real       W ~ code h + m                   m any real number, the minimum
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from math import ceil
from typing import Final

from bitwright.core.errors import SchemeError

FULL: Final = -1
"""In a Tile: the whole dimension."""

MIN_BITS, MAX_BITS, MIN_GROUP = 2, 8, 2


@dataclass(frozen=True)
class Levels:
    """The values that a code can stand for before it is scaled: the integers ``lowest`` to ``highest``."""

    lowest: int
    highest: int

    @property
    def steps(self) -> int:
        """The number of steps between the lowest and the highest level."""
        return self.highest - self.lowest

    @property
    def bits(self) -> int:
        """The number of bits of a code."""
        return self.steps.bit_length()


class Zero(StrEnum):
    """The zero that a tile has beside its scale; see the head of this file."""

    NONE = "none"
    CODE = "code"
    PRODUCT = "product"
    REAL = "real"


@dataclass(frozen=True)
class ScaleStorage:
    """The storage of scales: their dtype, and whether they have a sign.

    ``dtype`` is a name of torch's; None stands for that of the format or of the checkpoint.
    """

    dtype: str | None = None
    signed: bool = False


@dataclass(frozen=True)
class Grid:
    """What codes are drawn from, and what turns them into weights. Rows of it are at the end of this file.

    Asymmetric codes are ``0 .. 2**bits - 1``, symmetric ones ``-2**(bits-1) .. 2**(bits-1) - 1``. If the scale is
    signed (MLC-LLM), symmetric codes are ``-(2**(bits-1) - 1) .. 2**(bits-1)``: one step further up, or, under a
    negative scale, down.
    """

    levels: Levels
    scales: ScaleStorage = ScaleStorage()
    zero: Zero = Zero.CODE

    def __post_init__(self) -> None:
        _check_bits(self.bits)
        if self.signed_scale and not (self.symmetric and self.bits < MAX_BITS):
            raise SchemeError(f"a signed scale goes with a symmetric grid of less than {MAX_BITS} bits")
        if not self.symmetric and self.qmin != 0:
            raise SchemeError(f"codes from {self.qmin} on have no zero point: codes that have one begin at 0")

    @classmethod
    def integers(cls, bits: int, symmetric: bool = False) -> "Grid":
        """Make the grid of ``bits``-bit integers: with a zero point of the same bits, or symmetric without one."""
        _check_bits(bits)
        lowest = -(2 ** (bits - 1)) if symmetric else 0
        return cls(Levels(lowest, lowest + 2**bits - 1), zero=Zero.NONE if symmetric else Zero.CODE)

    @classmethod
    def with_signed_scale(cls, bits: int) -> "Grid":
        """Make MLC-LLM's grid: symmetric integers, one more above zero than below, under a signed float16 scale."""
        _check_bits(bits)
        lowest = 1 - 2 ** (bits - 1)
        return cls(Levels(lowest, lowest + 2**bits - 1), ScaleStorage("float16", signed=True), Zero.NONE)

    @classmethod
    def with_real_minimum(cls, bits: int) -> "Grid":
        """Make the grid of ``bits``-bit integers whose zero is a real number."""
        return replace(cls.integers(bits), zero=Zero.REAL)

    @property
    def bits(self) -> int:
        """The number of bits of a code."""
        return self.levels.bits

    @property
    def symmetric(self) -> bool:
        """Whether there is no zero: code 0 is the weight 0."""
        return self.zero is Zero.NONE

    @property
    def signed_scale(self) -> bool:
        """Whether scales may be negative."""
        return self.scales.signed

    @property
    def plain(self) -> bool:
        """Whether the grid is that of ordinary integers: scales without a sign, an integer zero point or none."""
        return not self.signed_scale and self.zero is not Zero.REAL

    @property
    def qmin(self) -> int:
        """The smallest code."""
        return self.levels.lowest

    @property
    def qmax(self) -> int:
        """The largest code."""
        return self.levels.highest

    @property
    def steps(self) -> int:
        """The number of steps between the smallest and the largest code, ``2**bits - 1``."""
        return self.levels.steps

    @property
    def reach(self) -> tuple[float, float]:
        """How many steps the ends of a range are from zero on a symmetric grid.

        If the scale is signed half a step beyond the outermost codes, so that no weight in the range is further from
        its code than half a step; else the same to both sides.
        """
        return -self.steps / 2, self.steps / 2 + self.signed_scale


USUAL_GROUPS, OFFERED = (256, 128, 64, 32), 3
"""Sizes of groups that engines run, and how many sizes a message offers."""


@dataclass(frozen=True)
class Tile:
    """The patch of a weight [O, I] that shares one scale: ``out`` rows by ``in_`` columns.

    Per output channel ``(1, FULL)``, groups along the input ``(1, 128)``, AdaDim's groups of
    one input channel ``(128, 1)``, per tensor ``(FULL, FULL)``. A ``ragged`` one need not divide the input: the last of
    a row ends where the row does.
    """

    out: int
    in_: int
    ragged: bool = False

    @property
    def transposed(self) -> "Tile":
        """The tile with its sides exchanged."""
        return Tile(self.in_, self.out)

    def size(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of one tile of a weight of this shape [O, I]."""
        return (shape[0] if self.out == FULL else self.out, shape[1] if self.in_ == FULL else self.in_)

    def counts(
        self, shape: tuple[int, int], offered: Callable[[int], bool] | None = lambda size: True
    ) -> tuple[int, int]:
        """The number of tiles along each dimension of a weight of this shape [O, I].

        Raises SchemeError if a tile does not divide the weight and is not ragged. The message names sizes that do, as
        far as they are ``offered``; None: no sizes.
        """
        (rows, columns), (t_o, t_i) = shape, self.size(shape)
        for extent, tile, which in ((rows, t_o, "output"), (columns, t_i, "input")):
            if extent % tile and not (self.ragged and which == "input"):
                wrong = f"{extent} {which} features do not divide into groups of {tile}"
                raise SchemeError(wrong if offered is None else wrong + _what_divides(extent, tile, offered))
        return rows // t_o, ceil(columns / t_i)

    def cut(self, shape: tuple[int, int]) -> bool:
        """Whether the last tile of a row of a weight of this shape [O, I] ends before it is whole."""
        return shape[1] % self.size(shape)[1] != 0

    def divides(self, shape: tuple[int, int]) -> bool:
        """Whether a weight of this shape [O, I] is made of such tiles."""
        (rows, columns), (t_o, t_i) = shape, self.size(shape)
        return rows % t_o == 0 and (self.ragged or columns % t_i == 0)


def _check_bits(bits: int) -> None:
    if not MIN_BITS <= bits <= MAX_BITS:
        raise SchemeError(f"{bits} bits asked for; a grid has {MIN_BITS} to {MAX_BITS} bits")


Q4_0: Final = Grid(Levels(-8, 7), ScaleStorage("float16"), Zero.NONE)
Q4_1: Final = Grid(Levels(0, 15), ScaleStorage("float16"), Zero.PRODUCT)
Q8_0: Final = Grid(Levels(-128, 127), ScaleStorage("float16"), Zero.NONE)
"""GGUF's types of blocks."""


def _what_divides(extent: int, wanted: int, offered: Callable[[int], bool]) -> str:
    """Up to three group sizes that divide the extent, near the one wanted.

    Those that engines run come first, then other multiples of 8; if there are neither, any.
    """
    divisors = [d for d in range(MIN_GROUP, extent + 1) if extent % d == 0] if extent < 10**6 else []
    divisors = sorted((d for d in divisors if offered(d)), key=lambda d: abs(d - wanted))
    usual = sorted([d for d in divisors if d in USUAL_GROUPS][:OFFERED])
    others = [d for d in divisors if d not in usual]
    others = [d for d in others if d % 8 == 0] or others * (not usual)
    sizes = [*usual, *sorted(others[: OFFERED - len(usual)])]
    return f"; what divides them: {', '.join(map(str, sizes)) or 'per channel, without a group'}"
