"""Grids whose scale has a sign, and tiles that the end of a row cuts short: by hand, and against loops over numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitwright.core.errors import SchemeError
from bitwright.core.fake_quant import fake_quantize
from bitwright.core.grid import Grid, ScaleStorage, Tile, Zero
from bitwright.core.packing import pack, unpack
from bitwright.core.qtensor import QTensor, affine, dequantize, packed_bits, quantize, span, tiled, whole
from bitwright.core.scheme import Scheme
from bitwright.steps.ranges import minmax

BITS = st.integers(2, 7)
RAGGED = Tile(1, 5, ragged=True)
PRESETS = [("mlc:q4f16_1", 4, 32), ("mlc:q3f16_1", 3, 40), ("mlc:q2f16_1", 2, 64)]


def signed(bits: int) -> Grid:
    return Grid.with_signed_scale(bits)


def heavy(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) ** 3 / 50


def written(weight: Tensor, grid: Grid, tile: Tile, dtype: torch.dtype = torch.float16) -> QTensor:
    scale, zero = affine(*minmax(weight, tile), grid, dtype)
    return QTensor(quantize(weight, scale, zero, grid, tile), scale, zero, grid, tile)


def test_the_codes() -> None:
    assert [(signed(b).qmin, signed(b).qmax) for b in (2, 3, 4)] == [(-1, 2), (-3, 4), (-7, 8)]
    for bits, symmetric in ((4, False), (8, True)):
        with pytest.raises(SchemeError, match="a signed scale goes with a symmetric grid of less than 8 bits"):
            Grid(
                Grid.integers(bits, symmetric).levels, ScaleStorage(signed=True), Zero.NONE if symmetric else Zero.CODE
            )


def test_by_hand() -> None:
    """Three bits, -3 to 4, are right for [-3.5, 4.5], and turned round for [-4.5, 3.5]; [-4.5, 4.5] takes 4.5 / 3.5."""
    weight = torch.tensor([[-3.5, 4.5, 1.0], [-4.5, 3.5, 1.0], [-4.5, 4.5, 0.0], [5.0, 9.0, 0.0], [0.0, 0.0, 0.0]])
    q = written(weight, signed(3), Tile(1, 3), torch.float32)
    assert q.scale.flatten().tolist() == [1.0, -1.0, pytest.approx(4.5 / 3.5), 2.0, 1.0]
    assert q.codes.tolist() == [[-3, 4, 1], [4, -3, -1], [-3, 4, 0], [2, 4, 0], [0, 0, 0]]


@settings(max_examples=100)
@given(BITS, st.integers(0, 10**6), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_against_a_loop(bits: int, seed: int, dtype: torch.dtype) -> None:
    """The least step that loses half a step at most, the extra code on the side that reaches further."""
    weight, grid, off = heavy(4, 12, seed) + (seed % 3 - 1) / 50, signed(bits), 2 ** (bits - 1) - 1
    q = written(weight, grid, Tile(1, 6), dtype)
    for o, row in enumerate(weight.tolist()):
        for g in range(2):
            part = row[6 * g : 6 * g + 6]
            down, up = max(0.0, -min(part)), max(0.0, max(part))
            step = max(max(down, up) / (off + 1.5), min(down, up) / (off + 0.5)) * (1 if up >= down else -1)
            h = torch.tensor(step).to(dtype).item()
            assert q.scale[o, g].item() == pytest.approx(h, rel=1e-6)
            codes = [min(max(round(w / q.scale[o, g].item()), -off), off + 1) for w in part]
            assert q.codes[o, 6 * g : 6 * g + 6].tolist() == pytest.approx(codes, abs=0)
    error = (q.dequantize(torch.float32) - weight).abs() / q.scale.float().abs().repeat_interleave(6, 1)
    assert error.max() <= 0.5 + 2**bits * torch.finfo(dtype).eps


@given(BITS, st.booleans(), st.integers(0, 1000))
def test_a_span_is_the_range_of_its_scale(bits: int, symmetric: bool, seed: int) -> None:
    for grid in (signed(bits), Grid.integers(bits, symmetric)):
        scale, zero = affine(*minmax(heavy(8, 12, seed), Tile(1, 6)), grid, torch.float16)
        again = affine(*span(scale.float(), zero, grid), grid, torch.float16)
        assert torch.equal(again[0], scale)
        assert zero is None or (again[1] is not None and torch.equal(again[1], zero))


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_it_loses_less_than_a_scale_without_a_sign(bits: int) -> None:
    weight, tile = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)), Tile(1, 32)
    lost = [
        float((written(weight, grid, tile).dequantize(torch.float32) - weight).square().sum())
        for grid in (signed(bits), Grid.integers(bits, symmetric=True))
    ]
    assert lost[0] < lost[1]


@settings(max_examples=50)
@given(BITS, st.sampled_from(["asymmetric", "symmetric", "signed"]), st.sampled_from([Tile(1, 6), RAGGED, Tile(2, 12)]),
       st.integers(0, 1000))  # fmt: skip
def test_training_sees_the_weight_that_is_written_and_the_gradient_of_autograd(
    bits: int, kind: str, tile: Tile, seed: int
) -> None:
    """Straight through every rounding: by autograd, from the formula written out."""
    grid = {"asymmetric": Grid.integers(bits), "symmetric": Grid.integers(bits, True), "signed": signed(bits)}[kind]
    weight, towards = heavy(4, 12, seed) * 50, heavy(4, 12, seed + 1)
    low, high = (end * 0.7 for end in minmax(weight, tile))
    scale, zero = affine(low, high, grid, torch.float32)
    made = fake_quantize(weight, low, high, grid, tile, torch.float32)
    assert torch.equal(made, dequantize(quantize(weight, scale, zero, grid, tile), scale, zero, tile))
    leaves = (weight.requires_grad_(), low.requires_grad_(), high.requires_grad_())
    found, want = (
        torch.autograd.grad((function(*leaves, grid, tile, torch.float32) * towards).sum(), leaves)
        for function in (fake_quantize, by_autograd)
    )
    for ours, theirs in zip(found, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def by_autograd(weight: Tensor, low: Tensor, high: Tensor, grid: Grid, tile: Tile, dtype: torch.dtype) -> Tensor:
    low, high, n = through(low, low.clamp(max=0)), through(high, high.clamp(min=0)), 2**grid.bits - 1
    turned = -low > high
    if not grid.symmetric:
        h = (high - low) / n
    elif grid.signed_scale:
        near, far = torch.where(turned, high, -low), torch.where(turned, -low, high)
        h = torch.maximum(near / (n / 2), far / (n / 2 + 1)) * torch.where(turned, -1.0, 1.0)
    else:
        h = torch.maximum(-low, high) * 2 / n
    h, low, high = (x[:, None, :, None] for x in (h, low, high))
    z = torch.zeros(()) if grid.symmetric else (-low / h).round().detach()
    ratio = tiled(weight, tile) / h
    code = through(ratio, ratio.round()) + z
    if grid.symmetric:
        return whole(code.clamp(grid.qmin, grid.qmax) * h, weight.shape)
    ends = torch.where(code < 0, low, torch.where(code > n, high, (code - z) * h))
    return whole(ends, weight.shape)


def through(x: Tensor, becomes: Tensor) -> Tensor:
    """What x becomes, with the gradient of x."""
    return becomes.detach() + (x - x.detach())


def test_packed_codes_are_counted_from_the_smallest() -> None:
    codes = torch.arange(-7, 9, dtype=torch.int8)[None]
    words = pack(codes, signed(4))
    assert [hex(word & 0xFFFFFFFF) for word in words[0].tolist()] == ["0x76543210", "0xfedcba98"]
    assert torch.equal(unpack(words, signed(4), 16), codes)


def test_a_tile_that_is_cut_short() -> None:
    """Twelve columns in groups of five: 5, 5 and 2, and nothing of the third but its own two decides its scale."""
    weight = heavy(3, 12)
    assert (RAGGED.counts((3, 12)), RAGGED.cut((3, 12)), RAGGED.cut((3, 10))) == ((3, 3), True, False)
    assert RAGGED.divides((3, 12)) and not Tile(1, 5).divides((3, 12))
    q = written(weight, signed(3), RAGGED)
    for start, end in ((0, 5), (5, 10), (10, 12)):
        part = written(weight[:, start:end].contiguous(), signed(3), Tile(1, -1))
        assert torch.equal(q.codes[:, start:end], part.codes)
        assert torch.equal(q.scale[:, start // 5], part.scale[:, 0])
        assert torch.equal(q.dequantize()[:, start:end], part.dequantize())
    assert torch.equal(whole(tiled(weight, RAGGED), weight.shape), weight)
    assert packed_bits((3, 12), signed(3), RAGGED, torch.float16) == 3 * (2 * 32 + 3 * 16)
    assert dequantize(q.codes, q.scale, None, RAGGED).is_contiguous()


def test_a_tile_wider_than_the_weight() -> None:
    q, wide = written(heavy(3, 12), signed(3), Tile(1, 40, ragged=True)), written(heavy(3, 12), signed(3), Tile(1, -1))
    assert torch.equal(q.scale, wide.scale) and torch.equal(q.codes, wide.codes)


def test_other_tiles_are_refused_as_before() -> None:
    with pytest.raises(SchemeError, match="12 input features do not divide into groups of 5"):
        tiled(heavy(3, 12), Tile(1, 5))
    with pytest.raises(SchemeError, match="3 output features do not divide into groups of 2"):
        tiled(heavy(3, 12), Tile(2, 5, ragged=True))


@pytest.mark.parametrize(("name", "bits", "group"), PRESETS)
def test_schemes_have_the_names_of_presets(name: str, bits: int, group: int) -> None:
    scheme = Scheme.parse(f" {name.upper()} ")
    assert (scheme.weight, scheme.tile, str(scheme)) == (signed(bits), Tile(1, group, ragged=True), name)
    assert (scheme.activations, scheme.kv, scheme.fixes_axis) == (None, None, True)
    assert scheme.weight.scales.dtype == "float16" and Scheme.parse("W4A16g32sym").weight.scales.dtype is None


def test_a_preset_that_is_none_is_refused_with_those_there_are() -> None:
    with pytest.raises(
        SchemeError, match=r"mlc:q4f16_1, mlc:q3f16_1, mlc:q2f16_1.* nearest valid scheme is mlc:q4f16_1"
    ):
        Scheme.parse("mlc:q4f16_0")
