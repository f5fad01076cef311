"""Schemes: what is quantized, to how many bits, and which weights share a scale.

A scheme is written ``W<bits>A<bits>[KV<bits>][g<size>[ic]][sym|asym]``:

    W4A16g128     4-bit weights in groups of 128 along the input, 16-bit activations
    W3A16g128ic   groups of 128 along the output: weights of one input channel share a scale
    W3A16         3-bit weights, one scale per output channel
    W4A4KV4       4-bit weights, activations, queries, and KV cache
    W8A16g64sym   symmetric weights (asymmetric is the default, as in the papers)

or named after the grid of an engine that has one of its own (``NAMED``): ``mlc:q4f16_1``.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import product
from math import ceil
from typing import Final

from bitwright.core.errors import SchemeError

FULL: Final = -1
"""In a Tile: the whole dimension."""

MIN_BITS, MAX_BITS, UNQUANTIZED_BITS = 2, 8, 16
MIN_GROUP = 2
LARGE_GROUP = 128

GRAMMAR = (
    "W<2-8>A<2-8 or 16>[KV<2-8 or 16>][g<group size>[ic]][sym|asym], "
    "for example W4A16g128, W3A16, W2A16g64, W8A8, W4A4KV4, W4A16g128sym, W3A16g128ic; or "
    "mlc:q4f16_1, mlc:q3f16_1, mlc:q2f16_1"
)


@dataclass(frozen=True)
class Grid:
    """The integers that codes are drawn from.

    Asymmetric codes are ``0 .. 2**bits - 1`` and come with a zero point in the same range;
    symmetric codes are ``-2**(bits-1) .. 2**(bits-1) - 1`` and their zero point is 0. Where the scale is signed
    (MLC-LLM), symmetric codes are ``-(2**(bits-1) - 1) .. 2**(bits-1)``: one step further up, or, under a negative
    scale, down. ``minimum``: the weights are stored with the minimum -z h in the place of z, rounded to float16 (GGUF).
    """

    bits: int
    symmetric: bool = False
    signed_scale: bool = False
    minimum: bool = False

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise SchemeError(f"{self.bits} bits asked for; a grid has {MIN_BITS} to {MAX_BITS} bits")
        if self.minimum and self.symmetric:
            raise SchemeError("a symmetric grid has no zero point, and so no minimum")
        if self.signed_scale and not (self.symmetric and self.bits < MAX_BITS):
            raise SchemeError(f"a signed scale goes with a symmetric grid of less than {MAX_BITS} bits")

    @property
    def qmin(self) -> int:
        """The smallest code."""
        return int(self.signed_scale) - 2 ** (self.bits - 1) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        """The largest code."""
        return self.qmin + self.steps

    @property
    def steps(self) -> int:
        """The number of steps between the smallest and the largest code, ``2**bits - 1``."""
        return int(2**self.bits) - 1

    @property
    def reach(self) -> tuple[float, float]:
        """How many steps the ends of a range are from zero where there is no zero point.

        Where the scale is signed half a step beyond the outermost codes, so that no weight in the range is further from
        its code than half a step; elsewhere the same to both sides.
        """
        return -self.steps / 2, self.steps / 2 + self.signed_scale


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
        """The same number of weights along the other dimension."""
        return Tile(self.in_, self.out)

    def size(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of one tile of a weight of this shape [O, I]."""
        return (shape[0] if self.out == FULL else self.out, shape[1] if self.in_ == FULL else self.in_)

    def counts(
        self, shape: tuple[int, int], offered: Callable[[int], bool] | None = lambda size: True
    ) -> tuple[int, int]:
        """Number of tiles along each dimension of a weight of this shape [O, I].

        Raises SchemeError where a tile does not divide the weight and is not ragged, with sizes that do, as far as they
        are ``offered``; None: with none.
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


@dataclass(frozen=True)
class Scheme:
    """What a user asked for: grids for weights, activations, KV cache, and the weights' tile.

    ``activation_bits`` None leaves activations in 16 bits. ``kv_bits`` None means that keys and
    values follow the activations; 16 leaves them alone.
    """

    weight: Grid
    tile: Tile = Tile(1, FULL)
    activation_bits: int | None = None
    kv_bits: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Scheme":
        """The scheme that a text names. Raises SchemeError with the grammar and the nearest valid scheme."""
        if (named := NAMED.get(text.strip().lower())) is not None:
            return named
        match = _PATTERN.fullmatch(text.strip())
        if match is None:
            raise SchemeError(f"'{text}' is no scheme. A scheme reads {GRAMMAR}. {_nearest(text)}")
        weight, activation, group = (_number(match[k]) for k in ("w", "a", "g"))
        cache = None if match["kv"] is None else _number(match["kv"])
        _check_numbers(text, weight, activation, cache, group if match["g"] else None)
        if match["ic"] and not match["g"]:
            raise _refused(text, "ic without a group: it needs the size of the groups along the output")
        return cls(
            weight=Grid(weight, (match["sym"] or "asym").lower() == "sym"),
            tile=_tile(group if match["g"] else FULL, per_input=match["ic"] is not None),
            activation_bits=None if activation == UNQUANTIZED_BITS else activation,
            kv_bits=cache,
        )

    @property
    def activations(self) -> Grid | None:
        """Grid of the linears' inputs and of the queries (dynamic, per token, asymmetric)."""
        return None if self.activation_bits is None else Grid(self.activation_bits)

    @property
    def kv(self) -> Grid | None:
        """Grid of keys and values (dynamic, per token and head, asymmetric)."""
        bits = self.activation_bits if self.kv_bits is None else self.kv_bits
        return None if bits is None or bits == UNQUANTIZED_BITS else Grid(bits)

    @property
    def float16_scales(self) -> bool:
        """Whether scales are float16 whatever the checkpoint's dtype is: those of engines' own grids are."""
        return self in NAMED.values()

    @property
    def fixes_axis(self) -> bool:
        """Whether it says which weights share a scale so that no method may choose: ``ic``, and engines' own grids."""
        return self.tile.in_ == 1 or self in NAMED.values()

    def __str__(self) -> str:
        for name, scheme in NAMED.items():
            if self == scheme:
                return name
        cache = "" if self.kv_bits is None else f"KV{self.kv_bits}"
        group = "" if self.tile.in_ == FULL else f"g{self.tile.in_}"
        if self.tile.out != 1:
            group = f"g{self.tile.out}ic"
        symmetry = "sym" if self.weight.symmetric else ""
        return f"W{self.weight.bits}A{self.activation_bits or UNQUANTIZED_BITS}{cache}{group}{symmetry}"


def _mlc(bits: int, group: int) -> Scheme:
    """A preset of MLC-LLM (docs/formats/mlc.md)."""
    return Scheme(Grid(bits, symmetric=True, signed_scale=True), Tile(1, group, ragged=True))


NAMED: Final[Mapping[str, Scheme]] = {
    "mlc:q4f16_1": _mlc(4, 32),
    "mlc:q3f16_1": _mlc(3, 40),
    "mlc:q2f16_1": _mlc(2, 64),
}
"""Schemes named after the grids of engines."""

# [0-9] and not \d, which also matches digits of other scripts.
_PATTERN = re.compile(
    r"W(?P<w>[0-9]+)A(?P<a>[0-9]+)(KV(?P<kv>[0-9]+))?(g(?P<g>[0-9]+))?(?P<ic>ic)?(?P<sym>sym|asym)?", re.I | re.A
)
_MAX_DIGITS = 9


def _tile(group: int, per_input: bool) -> Tile:
    return Tile(group, 1) if per_input else Tile(1, group)


def _number(digits: str | None) -> int:
    return 0 if digits is None else int(digits[-_MAX_DIGITS:]) if len(digits) <= _MAX_DIGITS else 10**_MAX_DIGITS


def _check_numbers(text: str, weight: int, activation: int, cache: int | None, group: int | None) -> None:
    wrong = None
    if not MIN_BITS <= weight <= MAX_BITS:
        wrong = f"weights of {weight} bits: weights take {MIN_BITS} to {MAX_BITS} bits"
    elif not _activation_bits_known(activation):
        wrong = f"activations of {activation} bits: they take {MIN_BITS} to {MAX_BITS} bits, or 16 to stay as they are"
    elif cache is not None and not _activation_bits_known(cache):
        wrong = f"a KV cache of {cache} bits: it takes {MIN_BITS} to {MAX_BITS} bits, or 16 to stay as it is"
    elif group is not None and not MIN_GROUP <= group < 10**_MAX_DIGITS:
        wrong = f"groups of {group}: a group has at least {MIN_GROUP} weights"
    if wrong:
        raise _refused(text, wrong)


def _refused(text: str, wrong: str) -> SchemeError:
    return SchemeError(f"scheme '{text}' asks for {wrong}. A scheme reads {GRAMMAR}. {_nearest(text)}")


def _activation_bits_known(bits: int) -> bool:
    return MIN_BITS <= bits <= MAX_BITS or bits == UNQUANTIZED_BITS


def _nearest(text: str) -> str:
    """The end of the message: bits and group moved to the nearest that are allowed, or the most similar text."""
    match = _PATTERN.fullmatch(text.strip())
    if match is not None:
        cache = "" if match["kv"] is None else f"KV{_near_bits(_number(match['kv']))}"
        size = None if match["g"] is None else min(max(_number(match["g"]), MIN_GROUP), LARGE_GROUP)
        group = f"g{size or LARGE_GROUP}ic" if match["ic"] else f"g{size}" if size else ""
        weight = min(max(_number(match["w"]), MIN_BITS), MAX_BITS)
        symmetry = "sym" if (match["sym"] or "").lower() == "sym" else ""
        return f"The nearest valid scheme is W{weight}A{_near_bits(_number(match['a']))}{cache}{group}{symmetry}."
    by_lower = {name.lower(): name for name in (*NAMED, *_common_schemes())}
    close = get_close_matches(text.strip().lower()[:40], list(by_lower), n=1, cutoff=0.3)
    return f"The nearest valid scheme is {by_lower[close[0]]}." if close else "A good start is W4A16g128."


def _near_bits(bits: int) -> int:
    return UNQUANTIZED_BITS if bits > (MAX_BITS + UNQUANTIZED_BITS) // 2 else min(max(bits, MIN_BITS), MAX_BITS)


def _common_schemes() -> Iterator[str]:
    weights = range(MIN_BITS, MAX_BITS + 1)
    groups = ("", *(f"g{size}{axis}" for size, axis in product((128, 64, 32), ("", "ic"))))
    for bits, group, symmetry in product(weights, groups, ("", "sym")):
        yield f"W{bits}A16{group}{symmetry}"
    for bits, activation, cache in product(weights, (8, 6, 4), ("", "KV4", "KV8", "KV16")):
        yield f"W{bits}A{activation}{cache}"


def _what_divides(extent: int, wanted: int, offered: Callable[[int], bool]) -> str:
    """Up to three group sizes that divide the extent, nearest to the one wanted, multiples of 8 first."""
    divisors = [d for d in range(MIN_GROUP, extent + 1) if extent % d == 0] if extent < 10**6 else []
    rounded = [d for d in divisors if d % 8 == 0] or divisors
    near = sorted((d for d in rounded if offered(d)), key=lambda d: abs(d - wanted))[:3]
    return f"; what divides them: {', '.join(map(str, sorted(near))) or 'per channel, without a group'}"
