"""Schemes: what is quantized, to how many bits, and which weights share a scale. An allocation: which linear has which.

A scheme is written ``W<bits>A<bits>[KV<bits>][g<size>[ic]][sym|asym|real]``:

    W4A16g128     4-bit weights in groups of 128 along the input, 16-bit activations
    W3A16g128ic   groups of 128 along the output: weights of one input channel share a scale
    W3A16         3-bit weights, one scale per output channel
    W4A4KV4       4-bit weights, activations, queries, and KV cache
    W8A16g64sym   symmetric weights (asymmetric is the default, as in the papers)
    W4A16g64real  asymmetric weights with a real-valued zero, a minimum, instead of an integer zero point

or named after the grid of an engine that has one of its own (``NAMED``): ``mlc:q4f16_1``.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher, get_close_matches
from itertools import product
from typing import Final

from bitwright.core.errors import RecipeError, SchemeError
from bitwright.core.grid import FULL, MAX_BITS, MIN_BITS, MIN_GROUP, Grid, Tile, Zero

UNQUANTIZED_BITS, LARGE_GROUP, USUAL_BITS, TIES = 16, 128, 4, 20

GRAMMAR = (
    "W<2-8>A<2-8 or 16>[KV<2-8 or 16>][g<group size>[ic]][sym|asym|real], "
    "for example W4A16g128, W3A16, W2A16g64, W8A8, W4A4KV4, W4A16g128sym, W3A16g128ic; or "
    "mlc:q4f16_1, mlc:q3f16_1, mlc:q2f16_1"
)


PER_CHANNEL: Final = Tile(1, FULL)


@dataclass(frozen=True)
class Scheme:
    """What a user asked for: grids for weights, activations, KV cache, and the weights' tile.

    ``activation_bits`` None leaves activations in 16 bits. ``kv_bits`` None means that keys and
    values follow the activations; 16 leaves them alone.
    """

    weight: Grid
    tile: Tile = PER_CHANNEL
    activation_bits: int | None = None
    kv_bits: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Scheme":
        """The scheme that a text names. Raises SchemeError with the grammar and the nearest valid scheme."""
        if (named := NAMED.get(text.strip().lower())) is not None:
            return named
        match = _PATTERN.fullmatch(text.strip())
        if match is None:
            raise SchemeError(f"'{text}' is no scheme. A scheme reads {GRAMMAR}. {_foreign(text) or _nearest(text)}")
        weight, activation, group = (_number(match[k]) for k in ("w", "a", "g"))
        cache = None if match["kv"] is None else _number(match["kv"])
        _check_numbers(text, weight, activation, cache, group if match["g"] else None)
        if match["ic"] and not match["g"]:
            raise _refused(text, "ic without a group: it needs the size of the groups along the output")
        return cls(
            weight=_weight_grid(weight, (match["sym"] or "asym").lower()),
            tile=_tile(group if match["g"] else FULL, per_input=match["ic"] is not None),
            activation_bits=None if activation == UNQUANTIZED_BITS else activation,
            kv_bits=cache,
        )

    @property
    def activations(self) -> Grid | None:
        """Grid of the linears' inputs and of the queries (dynamic, per token, asymmetric)."""
        return None if self.activation_bits is None else Grid.integers(self.activation_bits)

    @property
    def kv(self) -> Grid | None:
        """Grid of keys and values (dynamic, per token and head, asymmetric)."""
        bits = self.activation_bits if self.kv_bits is None else self.kv_bits
        return None if bits is None or bits == UNQUANTIZED_BITS else Grid.integers(bits)

    def with_activations(self, activation_bits: int | None, kv_bits: int | None) -> "Scheme":
        """This scheme of weights beside activations and KV cache of these bits; None leaves either in 16 bits."""
        follows = kv_bits == activation_bits
        return replace(self, activation_bits=activation_bits, kv_bits=None if follows else kv_bits or UNQUANTIZED_BITS)

    @property
    def quantizes_activations(self) -> bool:
        """Whether inputs of linears, or keys and values, are quantized."""
        return self.activations is not None or self.kv is not None

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
        symmetry = {Zero.NONE: "sym", Zero.REAL: "real"}.get(self.weight.zero, "")
        return f"W{self.weight.bits}A{self.activation_bits or UNQUANTIZED_BITS}{cache}{group}{symmetry}"


def _mlc(bits: int, group: int) -> Scheme:
    """A preset of MLC-LLM (docs/formats/mlc.md)."""
    return Scheme(Grid.with_signed_scale(bits), Tile(1, group, ragged=True))


NAMED: Final[Mapping[str, Scheme]] = {
    "mlc:q4f16_1": _mlc(4, 32),
    "mlc:q3f16_1": _mlc(3, 40),
    "mlc:q2f16_1": _mlc(2, 64),
}
"""Schemes named after the grids of engines."""

# [0-9] and not \d, which also matches digits of other scripts.
_PATTERN = re.compile(
    r"W(?P<w>[0-9]+)A(?P<a>[0-9]+)(KV(?P<kv>[0-9]+))?(g(?P<g>[0-9]+))?(?P<ic>ic)?(?P<sym>sym|asym|real)?", re.I | re.A
)
_MAX_DIGITS = 9
LARGEST = 10**_MAX_DIGITS
"""A number that stands for all larger ones."""


def _weight_grid(bits: int, zero: str) -> Grid:
    return Grid.with_real_minimum(bits) if zero == "real" else Grid.integers(bits, symmetric=zero == "sym")


def _tile(group: int, per_input: bool) -> Tile:
    return Tile(group, 1) if per_input else Tile(1, group)


def _number(digits: str | None) -> int:
    """The number that digits stand for, leading zeros aside; ``LARGEST`` for any that is larger."""
    shorter = (digits or "").lstrip("0") or "0"
    return int(shorter) if len(shorter) <= _MAX_DIGITS else LARGEST


def _bounded(number: int) -> str:
    return f"{number} or more" if number == LARGEST else str(number)


def _check_numbers(text: str, weight: int, activation: int, cache: int | None, group: int | None) -> None:
    wrong = None
    if not MIN_BITS <= weight <= MAX_BITS:
        wrong = f"weights of {_bounded(weight)} bits: weights take {MIN_BITS} to {MAX_BITS} bits"
    elif not _activation_bits_known(activation):
        allowed = f"{MIN_BITS} to {MAX_BITS} bits, or 16 to stay as they are"
        wrong = f"activations of {_bounded(activation)} bits: they take {allowed}"
    elif cache is not None and not _activation_bits_known(cache):
        wrong = f"a KV cache of {_bounded(cache)} bits: it takes {MIN_BITS} to {MAX_BITS} bits, or 16 to stay as it is"
    elif group is not None and group < MIN_GROUP:
        wrong = f"groups of {group}: a group has at least {MIN_GROUP} weights"
    elif group is not None and group >= LARGEST:
        wrong = f"groups of {LARGEST} or more: a group has at most {LARGEST - 1} weights, and mostly 32 to 128"
    if wrong:
        raise _refused(text, wrong)


def _refused(text: str, wrong: str) -> SchemeError:
    return SchemeError(f"scheme '{text}' asks for {wrong}. A scheme reads {GRAMMAR}. {_nearest(text)}")


def _activation_bits_known(bits: int) -> bool:
    return MIN_BITS <= bits <= MAX_BITS or bits == UNQUANTIZED_BITS


def _nearest(text: str) -> str:
    """The end of the message: bits and group moved to the nearest that are allowed, or the most similar text."""
    match = _PATTERN.fullmatch(_in_ascii(text))
    if match is not None:
        cache = "" if match["kv"] is None else f"KV{_near_bits(_number(match['kv']))}"
        size = None if match["g"] is None else min(max(_number(match["g"]), MIN_GROUP), LARGE_GROUP)
        group = f"g{size or LARGE_GROUP}ic" if match["ic"] else f"g{size}" if size else ""
        weight = min(max(_number(match["w"]), MIN_BITS), MAX_BITS)
        symmetry = (match["sym"] or "").lower().removeprefix("asym")
        return f"The nearest valid scheme is W{weight}A{_near_bits(_number(match['a']))}{cache}{group}{symmetry}."
    by_lower = {name.lower(): name for name in (*NAMED, *_common_schemes())}
    asked = _in_ascii(text).lower()[:40]
    close = get_close_matches(asked, list(by_lower), n=TIES, cutoff=0.3)
    if not close:
        return "A good start is W4A16g128."
    alike = [by_lower[name] for name in close if _ratio(name, asked) == _ratio(close[0], asked)]
    nearest = min(alike, key=lambda name: abs(Scheme.parse(name).weight.bits - USUAL_BITS))
    return f"The nearest valid scheme is {nearest}."


def _ratio(name: str, asked: str) -> float:
    return SequenceMatcher(None, asked, name).ratio()


def _in_ascii(text: str) -> str:
    """A text with the letters and digits of other scripts (W４A16) as those of ASCII, without spaces and dashes."""
    normal = unicodedata.normalize("NFKC", text[:100])
    digits = (str(unicodedata.decimal(sign, sign)) for sign in normal)
    return re.sub(r"[\s_-]", "", "".join(digits))


def _foreign(text: str) -> str:
    """The end of the message for a name that other tools give a grid: the scheme like it; "" for any other text."""
    name = text.strip().lower()[:40]
    bits = next((min(max(int(digits), MIN_BITS), MAX_BITS) for digits in re.findall(r"(?a:\d{1,9})", name)), 4)
    if re.fullmatch(r"(fp|bf|f|float|bfloat)(16|32)", name):
        return "16 and 32 bits are full precision, in which --exclude leaves linears. A good start is W4A16g128."
    if re.search(r"fp[0-9]|float[0-9]|e[0-9]m[0-9]", name) or re.match(r"(bnb-?)?nf[0-9]|mx|iq[0-9]", name):
        return f"That grid is not there yet; the scheme of integers with as many bits is W{bits}A16g32."
    if re.fullmatch(r"q[2-8](_(0|1|k))?(_[a-z]+)?", name):
        return f"That is a type of llama.cpp; with --format gguf, the scheme of as many bits is W{bits}A16g32."
    if re.fullmatch(r"(int|uint|w|awq|gptq)?[-_]?[0-9]{1,9}[-_ ]?(bits?|b)?", name):
        return f"The scheme of {bits}-bit weights in groups is W{bits}A16g128."
    return ""


def _near_bits(bits: int) -> int:
    return UNQUANTIZED_BITS if bits > (MAX_BITS + UNQUANTIZED_BITS) // 2 else min(max(bits, MIN_BITS), MAX_BITS)


def _common_schemes() -> Iterator[str]:
    weights = range(MIN_BITS, MAX_BITS + 1)
    groups = ("", *(f"g{size}{axis}" for size, axis in product((128, 64, 32), ("", "ic"))))
    for bits, group, symmetry in product(weights, groups, ("", "sym")):
        yield f"W{bits}A16{group}{symmetry}"
    for bits, activation, cache in product(weights, (8, 6, 4), ("", "KV4", "KV8", "KV16")):
        yield f"W{bits}A{activation}{cache}"


def schemes_for(texts: Iterable[str]) -> Iterator[tuple[str, Scheme]]:
    """Yield the pattern and the scheme of each ``PATTERN=SCHEME``; patterns with commas between them share one scheme.

    Raises RecipeError, SchemeError.
    """
    waiting = list[str]()
    for text in texts:
        pattern, equals, scheme = (part.strip() for part in text.partition("="))
        waiting.append(pattern)
        if not (pattern and scheme) and equals:
            break
        if equals:
            try:
                yield from ((name, Scheme.parse(scheme)) for name in waiting)
            except SchemeError as error:
                raise SchemeError(f"--scheme-for {pattern}: {error}") from None
            waiting = []
    if waiting:
        raise RecipeError(
            f"--scheme-for '{','.join(waiting)}' is no PATTERN=SCHEME; write '*.down_proj=W8A16g128' (in quotes)"
        )


@dataclass(frozen=True)
class Allocation:
    """A scheme for every linear of a model.

    ``schemes`` are those of linears that have another one than ``default``, by their names in the model; None leaves a
    linear in full precision. ``asked`` says, for messages, what gave a linear its scheme: an entry of --scheme-for, or
    the file of --allocation.
    """

    default: Scheme
    schemes: Mapping[str, Scheme | None] = field(default_factory=dict)
    asked: Mapping[str, str] = field(default_factory=dict, compare=False)

    def of(self, linear: str) -> Scheme | None:
        """The scheme of a linear; None if it stays in full precision."""
        return self.schemes.get(linear, self.default)

    def scheme(self, linear: str) -> Scheme:
        """The scheme of a linear that is quantized."""
        scheme = self.of(linear)
        assert scheme is not None, f"{linear} is not quantized"
        return scheme

    def asked_by(self, linear: str) -> str:
        """What gave a linear its scheme, as a message goes on after the scheme; nothing if it has that of most."""
        return f" ({self.asked[linear]})" if linear in self.asked else ""

    def within(self, block: str) -> "Allocation":
        """The schemes of a block's linears by their names in the block; "" is the model itself."""
        prefix = f"{block}." if block else ""
        own = {name: scheme for name, scheme in self.schemes.items() if name.startswith(prefix)}
        return Allocation(self.default, {name.removeprefix(prefix): scheme for name, scheme in own.items()})

    @property
    def distinct(self) -> tuple[Scheme, ...]:
        """Every scheme once, the default first."""
        return tuple(dict.fromkeys((self.default, *filter(None, self.schemes.values()))))

    @property
    def own(self) -> dict[str, Scheme]:
        """The schemes of quantized linears that have another one than the default."""
        return {name: scheme for name, scheme in self.schemes.items() if scheme not in (None, self.default)}

    @property
    def uniform(self) -> bool:
        """Whether all quantized linears have one scheme."""
        return not self.own

    def to_json(self, linears: Iterable[str]) -> dict[str, object]:
        """``allocation.json``: ``{"scheme": default, "linears": {name: scheme or null}}`` for these linears."""
        schemes = {linear: self.of(linear) for linear in linears}
        return {
            "scheme": str(self.default),
            "linears": {linear: None if scheme is None else str(scheme) for linear, scheme in schemes.items()},
        }
