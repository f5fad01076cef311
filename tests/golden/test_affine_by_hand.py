"""Quantized values worked out by hand. The working stands beside each; nothing here was computed by a program.

Both sides are held to it: Bitwright, and the independent implementation that the other golden tests trust.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tests.golden import affine

from bitwright.core.decisions import LinearDecision
from bitwright.core.grid import FULL, Grid, Tile
from bitwright.core.qtensor import QTensor
from bitwright.core.scheme import Scheme
from bitwright.steps.apply import quantize_linear


@dataclass(frozen=True)
class Case:
    weight: list[list[float]]
    bits: int
    symmetric: bool
    tile: tuple[int, int]
    dtype: str
    scale: list[list[float]]
    zero: list[list[int]]
    codes: list[list[int]]
    values: list[list[float]]


CASES = {
    # Range [-1, 2], h = 3/3 = 1, z = -round(-1/1) = 1.
    # W/h: -1, 0.5, 2, 0.25 -> to even: -1, 0, 2, 0 -> codes + 1: 0, 1, 3, 1.
    "2 bits": Case(
        weight=[[-1.0, 0.5, 2.0, 0.25]],
        bits=2,
        symmetric=False,
        tile=(1, FULL),
        dtype="float32",
        scale=[[1.0]],
        zero=[[1]],
        codes=[[0, 1, 3, 1]],
        values=[[-1.0, 0.0, 2.0, 0.0]],
    ),
    # Range [-0.375, 1.5], h = 1.875/15 = 0.125, z = 3.
    # W/h: -3, 12, 1.5, 0.5, 2.5, -1.5 -> to even: -3, 12, 2, 0, 2, -2 -> + 3.
    "4 bits, ties to even": Case(
        weight=[[-0.375, 1.5, 0.1875, 0.0625, 0.3125, -0.1875]],
        bits=4,
        symmetric=False,
        tile=(1, FULL),
        dtype="float16",
        scale=[[0.125]],
        zero=[[3]],
        codes=[[0, 15, 5, 3, 5, 1]],
        values=[[-0.375, 1.5, 0.25, 0.0, 0.25, -0.25]],
    ),
    # All positive, smallest 3: the range is [0, 7] all the same, h = 7/7 = 1, z = 0. Were it [3, 7], z would be -5.
    "3 bits, positive weights": Case(
        weight=[[3.0, 4.0, 7.0, 5.0]],
        bits=3,
        symmetric=False,
        tile=(1, FULL),
        dtype="bfloat16",
        scale=[[1.0]],
        zero=[[0]],
        codes=[[3, 4, 7, 5]],
        values=[[3.0, 4.0, 7.0, 5.0]],
    ),
    # All negative: range [-14, 0], h = 2, z = 7. W/h: -7, -1, -2.5 -> -7, -1, -2.
    "3 bits, negative weights": Case(
        weight=[[-14.0, -2.0, -5.0]],
        bits=3,
        symmetric=False,
        tile=(1, FULL),
        dtype="bfloat16",
        scale=[[2.0]],
        zero=[[7]],
        codes=[[0, 6, 5]],
        values=[[-14.0, -2.0, -4.0]],
    ),
    # 1/7 = 0.142857; bfloat16 has 8 digits: between 1/8 and 1/4 its steps are 1/1024, 1024/7 = 146.29 -> 146/1024.
    # 1 / 0.142578125 = 7.0137 -> 7. The value 7 * 146/1024 = 1022/1024 = 255.5/256; below 1 the steps are
    # 1/256: to even, 256.
    # 0.5 / 0.142578125 = 3.507 -> 4, and 4 * 146/1024 = 0.5703125 exactly (h rounded first; with 1/7 it is 3.5 -> 4).
    "3 bits, the scale rounded down": Case(
        weight=[[1.0, 0.5, 0.0]],
        bits=3,
        symmetric=False,
        tile=(1, FULL),
        dtype="bfloat16",
        scale=[[0.142578125]],
        zero=[[0]],
        codes=[[7, 4, 0]],
        values=[[1.0, 0.5703125, 0.0]],
    ),
    # Range [0, 1], 2 bits: 1/3 in bfloat16: between 1/4 and 1/2 the steps are 1/512, 512/3 = 170.67 -> 171/512 =
    # 0.333984375, so h is rounded up. The weight 0.5 is 1.4971 h -> 1; with h = 1/3 unrounded it were 1.5 -> 2.
    # The value of code 3 is 513/512, and above 1 bfloat16's steps are 1/128: 128.25 -> 128, which is 1.
    "2 bits, rounding the scale first decides a code": Case(
        weight=[[1.0, 0.5]],
        bits=2,
        symmetric=False,
        tile=(1, FULL),
        dtype="bfloat16",
        scale=[[0.333984375]],
        zero=[[0]],
        codes=[[3, 1]],
        values=[[1.0, 0.333984375]],
    ),
    # Symmetric, r = 7.5: h = 15/15 = 1, codes -8 .. 7. -7.5 -> -8 (even); 7.5 -> 8, clamped to 7; 3.5 -> 4, 2.5 -> 2.
    "4 bits symmetric": Case(
        weight=[[-7.5, 7.5, 3.5, 2.5, -0.5]],
        bits=4,
        symmetric=True,
        tile=(1, FULL),
        dtype="float32",
        scale=[[1.0]],
        zero=[[0]],
        codes=[[-8, 7, 4, 2, 0]],
        values=[[-8.0, 7.0, 4.0, 2.0, 0.0]],
    ),
    # Symmetric, 2 bits, r = 3: h = 6/3 = 2, codes -2 .. 1. 3/2 -> 2, clamped to 1; -3/2 -> -2; 1/2 -> 0.
    "2 bits symmetric": Case(
        weight=[[3.0, -3.0, 1.0]],
        bits=2,
        symmetric=True,
        tile=(1, FULL),
        dtype="float16",
        scale=[[2.0]],
        zero=[[0]],
        codes=[[1, -2, 0]],
        values=[[2.0, -4.0, 0.0]],
    ),
    # 8 bits, range [-127.5, 127.5]: h = 1, z = -round(-127.5) = 128 (to even). 127.5 -> 128 + 128, clamped to 255.
    # 1 -> 129. The value of 255 is 127: half a step is lost at one end.
    "8 bits": Case(
        weight=[[-127.5, 127.5, 1.0]],
        bits=8,
        symmetric=False,
        tile=(1, FULL),
        dtype="float32",
        scale=[[1.0]],
        zero=[[128]],
        codes=[[0, 255, 129]],
        values=[[-128.0, 127.0, 1.0]],
    ),
    # Groups of two along the input. Row 0: [-1, 2] h=1 z=1; [0, 6] h=2 z=0. Row 1: [-3, 0] h=1 z=3; [0, 0] h=1 z=0.
    "groups along the input": Case(
        weight=[[-1.0, 2.0, 6.0, 4.0], [-3.0, -2.0, 0.0, 0.0]],
        bits=2,
        symmetric=False,
        tile=(1, 2),
        dtype="bfloat16",
        scale=[[1.0, 2.0], [1.0, 1.0]],
        zero=[[1, 0], [3, 0]],
        codes=[[0, 3, 3, 2], [0, 1, 0, 0]],
        values=[[-1.0, 2.0, 6.0, 4.0], [-3.0, -2.0, 0.0, 0.0]],
    ),
    # Groups of two along the output, of one input channel each (AdaDim). Column 0: [-1, 2] h=1 z=1; column 1: [0, 6]
    # h=2 z=0; column 2: [-9, 3] h=4, z=-round(-2.25)=2: -9/4 -> -2, 3/4 -> 1.
    "groups along the output": Case(
        weight=[[-1.0, 6.0, -9.0], [2.0, 4.0, 3.0]],
        bits=2,
        symmetric=False,
        tile=(2, 1),
        dtype="float32",
        scale=[[1.0, 2.0, 4.0]],
        zero=[[1, 0, 2]],
        codes=[[0, 3, 0], [3, 2, 3]],
        values=[[-1.0, 6.0, -8.0], [2.0, 4.0, 4.0]],
    ),
    # One scale for all: [-2, 4], h = 6/3 = 2, z = 1. 1/2 = 0.5 -> 0, 3/2 = 1.5 -> 2.
    "per tensor": Case(
        weight=[[-2.0, 1.0], [4.0, 3.0]],
        bits=2,
        symmetric=False,
        tile=(FULL, FULL),
        dtype="float16",
        scale=[[2.0]],
        zero=[[1]],
        codes=[[0, 1], [3, 3]],
        values=[[-2.0, 0.0], [4.0, 4.0]],
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bitwright(case: Case) -> None:
    dtype = getattr(torch, case.dtype)
    weight = torch.tensor(case.weight, dtype=dtype)
    assert weight.tolist() == case.weight, "the case's weights must be values of its dtype"
    scheme = Scheme(Grid.integers(case.bits, case.symmetric), Tile(*case.tile))
    q = quantize_linear(weight, LinearDecision(), scheme, dtype)
    assert q.codes.tolist() == case.codes
    assert q.scale.dtype == dtype
    assert q.scale.tolist() == case.scale
    assert case.symmetric if q.zero is None else q.zero.tolist() == case.zero
    assert q.dequantize().tolist() == case.values


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_independent_implementation(case: Case) -> None:
    golden = affine.quantize(np.array(case.weight), case.bits, case.symmetric, case.tile, case.dtype)
    assert golden.codes.tolist() == case.codes
    assert golden.scale.tolist() == case.scale
    assert golden.zero.tolist() == case.zero
    assert golden.values(case.dtype).tolist() == case.values


def test_outliers_take_no_part_in_the_codes_but_are_exact() -> None:
    # [-1, 0.5, 2, 0.25] as above; 0.5 and 0.25 (positions 1 and 3) are kept as they are.
    weight = torch.tensor([[-1.0, 0.5, 2.0, 0.25]])
    kept = LinearDecision(outliers=torch.tensor([[False, True, False, True]]))
    q = quantize_linear(weight, kept, Scheme(Grid.integers(2)), torch.float32)
    assert q.outlier_index is not None and q.outlier_index.tolist() == [1, 3]
    assert q.dequantize().tolist() == [[-1.0, 0.5, 2.0, 0.25]]


def test_storage_bits() -> None:
    # W [64, 128], 4 bits, groups of 64, bfloat16 scales: 8192 codes of 4 bits, 128 scales of 16, 128 zeros of 4:
    # 32768 + 2048 + 512 = 35328 bits, 4.3125 a weight. Two outliers in bfloat16 add 2 * (32 + 16) = 96.
    weight = torch.zeros(64, 128, dtype=torch.bfloat16)
    scheme = Scheme(Grid.integers(4), Tile(1, 64))
    q = quantize_linear(weight, LinearDecision(), scheme, torch.bfloat16)
    assert (q.storage_bits, q.bits_per_weight) == (35328, 4.3125)
    mask = torch.zeros(64, 128, dtype=torch.bool)
    mask[3, 5] = mask[7, 9] = True
    assert quantize_linear(weight, LinearDecision(outliers=mask), scheme, torch.bfloat16).storage_bits == 35328 + 96
    # Symmetric, per channel, float32: 8192 * 4 + 64 * 32 = 34816, no zeros.
    symmetric = quantize_linear(weight, LinearDecision(), Scheme(Grid.integers(4, True)), torch.float32)
    assert symmetric.storage_bits == 34816


def test_storage_bits_of_words_that_are_not_full() -> None:
    # W [96, 32], 3 bits, groups of 32 along the output, bfloat16 scales: a row of 32 codes is 96 bits, 3 words; a
    # column has 3 scales, and 3 zeros: 9 bits, in a word of 32.
    # 96 * 96 + 96 * 16 + 32 * 32 = 9216 + 1536 + 1024 = 11776 bits.
    along_outputs = quantize_linear(
        torch.zeros(96, 32), LinearDecision(), Scheme(Grid.integers(3), Tile(32, 1)), torch.bfloat16
    )
    assert along_outputs.storage_bits == 11776
    # W [5, 11], 3 bits, per channel, float32 scales: a row of 11 codes is 33 bits, 2 words; 5 zeros are 15 bits, 1
    # word. 5 * 64 + 5 * 32 + 32 = 512 bits.
    ragged = quantize_linear(torch.zeros(5, 11), LinearDecision(), Scheme(Grid.integers(3)), torch.float32)
    assert ragged.storage_bits == 512


def test_a_range_that_is_decided_is_the_one_that_is_used() -> None:
    # Range [-1, 2] decided for weights that reach from -3 to 5: h = 1, z = 1; -3 and 5 are clamped to codes 0 and 3.
    decided = LinearDecision(low=torch.tensor([[-1.0]]), high=torch.tensor([[2.0]]))
    q = quantize_linear(torch.tensor([[-3.0, 5.0, 1.0]]), decided, Scheme(Grid.integers(2)), torch.float32)
    assert q.codes.tolist() == [[0, 3, 2]]
    assert q.dequantize().tolist() == [[-1.0, 2.0, 1.0]]


def test_codes_and_a_tile_that_are_decided_are_the_ones_that_are_used() -> None:
    # The tile (2, 1) replaces the scheme's (1, FULL): column 0 [-1, 2] h=1 z=1, column 1 [0, 6] h=2 z=0.
    weight = torch.tensor([[-1.0, 6.0], [2.0, 4.0]])
    codes = torch.tensor([[3, 0], [0, 3]], dtype=torch.uint8)
    decided = LinearDecision(tile=Tile(2, 1), codes=codes)
    q: QTensor = quantize_linear(weight, decided, Scheme(Grid.integers(2)), torch.float32)
    assert q.dequantize().tolist() == [[2.0, 0.0], [-1.0, 6.0]]
    assert (q.tile, q.shape) == (Tile(2, 1), (2, 2))


@pytest.mark.parametrize(
    ("dtype", "value", "expected"),
    [
        # bfloat16 has 8 digits: above 256 its steps are 2. 257 is half way: to even (128 * 2 = 256); 259 -> 260.
        ("bfloat16", 257.0, 256.0),
        ("bfloat16", 259.0, 260.0),
        # float16 has 11 digits: above 2048 its steps are 2; its smallest step is 2**-24.
        ("float16", 2049.0, 2048.0),
        ("float16", 2051.0, 2052.0),
        ("float16", 1.4 * 2.0**-24, 2.0**-24),
        # float32 has 24 digits.
        ("float32", 2.0**24 + 1, 2.0**24),
        ("float32", -(2.0**24) - 3, -(2.0**24) - 4),
        ("float32", 0.0, 0.0),
    ],
)
def test_rounding_of_the_independent_implementation(dtype: str, value: float, expected: float) -> None:
    assert affine.rounded(np.array([value]), dtype)[0] == expected
