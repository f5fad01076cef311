import time
from dataclasses import dataclass

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bitwright.core.errors import SchemeError
from bitwright.core.grid import FULL, Grid, Tile
from bitwright.core.scheme import GRAMMAR, Scheme

BITS = st.integers(2, 8)
SCHEMES = st.builds(
    Scheme,
    weight=st.builds(Grid.integers, BITS, st.booleans()) | st.builds(Grid.with_real_minimum, BITS),
    tile=st.builds(Tile, st.just(1), st.just(FULL) | st.integers(2, 10**9 - 1))
    | st.builds(Tile, st.integers(2, 10**9 - 1), st.just(1)),
    activation_bits=st.none() | BITS,
    kv_bits=st.none() | st.just(16) | BITS,
)
# Texts that are nearly schemes: what a fuzzer of single characters would need years to write.
LOOK_ALIKES = ["\u0664", "\u017f", "\u212a"]  # an Arabic four, the long s, the Kelvin sign
PARTS = ["W", "w", "A", "KV", "k", "g", "ic", "sym", "asym", "4", "16", "0", "-1", " ", "9" * 5000]
NEARLY = st.lists(st.sampled_from(PARTS + LOOK_ALIKES)).map("".join)


@dataclass(frozen=True)
class Meaning:
    bits: int
    activations: int | None
    kv: int | None
    group: int
    symmetric: bool
    per_input: bool = False


def meaning(scheme: Scheme) -> Meaning:
    activations = None if scheme.activations is None else scheme.activations.bits
    kv = None if scheme.kv is None else scheme.kv.bits
    assert 1 in (scheme.tile.out, scheme.tile.in_)
    per_input = scheme.tile.out != 1
    group = scheme.tile.out if per_input else scheme.tile.in_
    return Meaning(scheme.weight.bits, activations, kv, group, scheme.weight.symmetric, per_input)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("W4A16", Meaning(4, None, None, FULL, False)),
        ("W3A16g128", Meaning(3, None, None, 128, False)),
        ("W2A16g64", Meaning(2, None, None, 64, False)),
        ("W8A8", Meaning(8, 8, 8, FULL, False)),
        ("W6A6", Meaning(6, 6, 6, FULL, False)),
        ("W4A4", Meaning(4, 4, 4, FULL, False)),
        ("W4A4KV4", Meaning(4, 4, 4, FULL, False)),
        ("W4A4KV16", Meaning(4, 4, None, FULL, False)),
        ("W4A16KV8", Meaning(4, None, 8, FULL, False)),
        ("W4A16KV16", Meaning(4, None, None, FULL, False)),
        ("W4A16sym", Meaning(4, None, None, FULL, True)),
        ("W4A16g32sym", Meaning(4, None, None, 32, True)),
        ("W4A8KV4g64sym", Meaning(4, 8, 4, 64, True)),
        ("W3A16g128ic", Meaning(3, None, None, 128, False, per_input=True)),
        ("W4A4g64icsym", Meaning(4, 4, 4, 64, True, per_input=True)),
    ],
)
def test_meaning_and_print(text: str, expected: Meaning) -> None:
    scheme = Scheme.parse(text)
    assert meaning(scheme) == expected
    assert str(scheme) == text


@pytest.mark.parametrize("text", ["w4a16G128", " W4A16g128\n", "W4A16g128asym", "W4A16g128ASYM", "w04A016g0128"])
def test_other_ways_to_write_it(text: str) -> None:
    assert Scheme.parse(text) == Scheme.parse("W4A16g128")


def test_every_scheme_of_the_grammar_survives_printing() -> None:
    count = 0
    for weight in range(2, 9):
        for activation in (*range(2, 9), 16):
            for cache in ("", "KV2", "KV4", "KV8", "KV16"):
                for group in ("", "g2", "g64", "g128", "g999999999", "g2ic", "g128ic", "g999999999ic"):
                    for symmetry in ("", "sym"):
                        text = f"W{weight}A{activation}{cache}{group}{symmetry}"
                        assert str(Scheme.parse(text)) == text
                        count += 1
    assert count == 7 * 8 * 5 * 8 * 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("W1A16", "weights of 1 bits: weights take 2 to 8 bits"),
        ("W9A16", "weights of 9 bits"),
        ("W16A16", "weights of 16 bits"),
        ("W4A1", "activations of 1 bits"),
        ("W4A9", "activations of 9 bits: they take 2 to 8 bits, or 16"),
        ("W4A32", "activations of 32 bits"),
        ("W4A4KV1", "a KV cache of 1 bits"),
        ("W4A4KV12", "a KV cache of 12 bits: it takes 2 to 8 bits, or 16"),
        ("W4A16g1ic", "groups of 1: a group has at least 2 weights"),
        ("W4A16g0", "groups of 0: a group has at least 2 weights"),
        ("W4A16g1", "groups of 1"),
        ("W4A16g1000000000", "groups of 1000000000"),
        (f"W4A16g{9**30}", "groups of 1000000000 or more: a group has at most 999999999 weights"),
        (f"W{9**30}A16", "weights of 1000000000 or more bits: weights take 2 to 8 bits"),
    ],
)
def test_numbers_out_of_range(text: str, says: str) -> None:
    with pytest.raises(SchemeError) as error:
        Scheme.parse(text)
    assert f"scheme '{text}' asks for {says}" in str(error.value)
    assert GRAMMAR in str(error.value)


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("W4", "W4A16g128"),
        ("4A16g128", "W4A16g128"),
        ("W4A16g", "W4A16"),
        ("W4A16-g128", "W4A16g128"),
        ("W4A16 g128", "W4A16g128"),
        ("int4", "W4A16g128"),
        ("NVFP4", "W4A16g32"),
        ("FP8", "W8A16g32"),
        ("INT8", "W8A16g128"),
        ("4bit", "W4A16g128"),
        ("3-bits", "W3A16g128"),
        ("q4_k_m", "W4A16g32"),
        ("Q8_0", "W8A16g32"),
        ("nf4", "W4A16g32"),
        ("mxfp4", "W4A16g32"),
        ("iq2_xs", "W2A16g32"),
        ("float8_e4m3fn", "W8A16g32"),
        ("bf16", None),
        ("", None),
        ("W4A16g128symm", "W4A16g128sym"),
        ("W4.5A16", None),
        ("W-4A16", "W4A16"),
        ("W4A16KV", None),
        ("W4A16sym128", None),
        ("W3A16g128W3A16g128", "W3A16g128"),
        ("W3A16icg128", None),
        ("W3A16g128icc", "W3A16g128ic"),
        ("W\u0664A16", "W4A16"),
        ("W\uff14A16", "W4A16"),  # full width
        ("\uff37\uff13\uff21\uff11\uff16g32", "W3A16g32"),
        ("W4_A16 G64", "W4A16g64"),
        ("WxA16", "W4A16"),
    ],
)
def test_unknown_texts_name_the_grammar_and_the_nearest_scheme(text: str, nearest: str | None) -> None:
    with pytest.raises(SchemeError) as error:
        Scheme.parse(text)
    message = str(error.value)
    assert f"'{text}' is no scheme. A scheme reads {GRAMMAR}." in message
    suggested = message.rpartition(" is ")[2].removesuffix(".")
    Scheme.parse(suggested)  # raises SchemeError unless the suggestion is a scheme
    assert nearest is None or suggested == nearest


@pytest.mark.parametrize(
    ("text", "nearest"), [("W3A16ic", "W3A16g128ic"), ("w4a4KV8icsym", "W4A4KV8g128icsym"), ("W4A4g1ic", "W4A4g2ic")]
)
def test_groups_along_the_output_need_a_size(text: str, nearest: str) -> None:
    with pytest.raises(SchemeError, match=rf"The nearest valid scheme is {nearest}\.$"):
        Scheme.parse(text)


@given(st.text() | NEARLY)
@example("W" + "9" * 10**6 + "A16")
@example("W4A16g" + "1" * 10**6)
@example("W" * 10**6)
@example("sym" * 10**5)
def test_any_text_parses_or_is_refused(text: str) -> None:
    start = time.process_time()
    try:
        scheme = Scheme.parse(text)
    except SchemeError as error:
        assert GRAMMAR in str(error)
    else:
        assert str(Scheme.parse(str(scheme))) == str(scheme)
        assert Scheme.parse(str(scheme)) == scheme
    assert time.process_time() - start < 1


@given(SCHEMES)
def test_a_printed_scheme_parses_back_to_itself(scheme: Scheme) -> None:
    assert Scheme.parse(str(scheme)) == scheme


@given(SCHEMES.map(str), st.data())
def test_case_does_not_matter(text: str, data: st.DataObject) -> None:
    swapped = "".join(c.swapcase() if data.draw(st.booleans()) else c for c in text)
    assert Scheme.parse(swapped) == Scheme.parse(text)


@pytest.mark.parametrize("text", ["W4A16\u017fym", "W4A4\u212aV4"])
def test_letters_that_only_look_alike_are_refused(text: str) -> None:
    with pytest.raises(SchemeError):
        Scheme.parse(text)


@pytest.mark.parametrize("bits", range(2, 9))
def test_grids(bits: int) -> None:
    asymmetric, symmetric = Grid.integers(bits), Grid.integers(bits, symmetric=True)
    assert (asymmetric.qmin, asymmetric.qmax) == (0, 2**bits - 1)
    assert (symmetric.qmin, symmetric.qmax) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert asymmetric.steps == symmetric.steps == 2**bits - 1


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16])
def test_no_grid_of_other_bits(bits: int) -> None:
    with pytest.raises(SchemeError, match=f"{bits} bits asked for; a grid has 2 to 8 bits"):
        Grid.integers(bits)


@pytest.mark.parametrize(
    ("tile", "size", "counts"),
    [
        (Tile(1, FULL), (1, 96), (48, 1)),
        (Tile(1, 32), (1, 32), (48, 3)),
        (Tile(16, 1), (16, 1), (3, 96)),
        (Tile(FULL, FULL), (48, 96), (1, 1)),
        (Tile(FULL, 1), (48, 1), (1, 96)),
    ],
)
def test_tiles_of_a_weight(tile: Tile, size: tuple[int, int], counts: tuple[int, int]) -> None:
    assert (tile.size((48, 96)), tile.counts((48, 96))) == (size, counts)


@pytest.mark.parametrize(
    ("tile", "shape", "says"),
    [
        # The divisors of 11008 (= 2**8 * 43) that are multiples of 8 and lie nearest to 96 are 64, 128 and 32.
        (Tile(1, 96), (4096, 11008), "11008 input features do not divide into groups of 96"),
        (Tile(1, 96), (4096, 11008), "; what divides them: 32, 64, 128"),
        (Tile(96, 1), (11008, 4096), "11008 output features do not divide into groups of 96"),
        # The divisors of 35 are 5, 7, 35 and none is a multiple of 8.
        (
            Tile(1, 128),
            (64, 576),
            "576 input features do not divide into groups of 128; what divides them: 32, 64, 144",
        ),
        (Tile(1, 8), (4, 35), "35 input features do not divide into groups of 8; what divides them: 5, 7, 35"),
        # A prime is divided by itself alone.
        (Tile(1, 64), (4, 13), "what divides them: 13"),
        (Tile(1, 64), (4, 10**6 + 3), "what divides them: per channel, without a group"),
    ],
)
def test_a_tile_that_does_not_divide_says_what_does(tile: Tile, shape: tuple[int, int], says: str) -> None:
    with pytest.raises(SchemeError) as error:
        tile.counts(shape)
    assert says in str(error.value)


@given(st.integers(1, 3000), st.integers(2, 4000))
def test_group_sizes_that_are_suggested_divide(columns: int, group: int) -> None:
    if columns % group == 0:
        assert Tile(1, group).counts((1, columns)) == (1, columns // group)
        return
    with pytest.raises(SchemeError) as error:
        Tile(1, group).counts((1, columns))
    suggested = str(error.value).rpartition(": ")[2]
    for size in [] if suggested.startswith("per channel") else suggested.split(", "):
        assert Tile(1, int(size)).counts((1, columns)) == (1, columns // int(size))
