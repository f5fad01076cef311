"""The data-free range: against every range tried by hand, and what it promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitwright.core.grid import Grid, Tile
from bitwright.core.method import Range
from bitwright.core.qtensor import affine, dequantize, quantize, tiled
from bitwright.steps import range_fit, range_gradient
from bitwright.steps.range_fit import fitted
from bitwright.steps.range_gradient import by_gradient
from bitwright.steps.ranges import minmax, nearest_to_weights

TILES = [Tile(1, -1), Tile(1, 32), Tile(32, 1), Tile(-1, -1)]


def written(weight: Tensor, ends: Range, grid: Grid, tile: Tile, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    scale, zero = affine(*ends, grid, dtype)
    return dequantize(quantize(weight, scale, zero, grid, tile), scale.float(), zero, tile)


def loss(weight: Tensor, found: Tensor, tile: Tile, alignment: float) -> Tensor:
    """The objective of each tile, from the weights as they would be written."""
    w, error = (tiled(x.double(), tile) for x in (weight, found - weight))
    along = (error * w).sum((1, 3)).square() / w.square().sum((1, 3)).clamp(min=1e-300)
    return error.square().sum((1, 3)) + alignment * along


def heavy(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) ** 3 / 50


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    tile=st.sampled_from(TILES),
    alignment=st.sampled_from([0.0, 16.0]),
    power=st.sampled_from([1, 3]),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
    moved=st.sampled_from([0.0, 0.5]),
)
def test_no_tile_is_worse_than_with_min_max(
    seed: int, bits: int, symmetric: bool, tile: Tile, alignment: float, power: int, scale: float, moved: float
) -> None:
    weight = (torch.randn(32, 64, generator=torch.Generator().manual_seed(seed)) ** power + moved) * scale
    grid = Grid.integers(bits, symmetric)
    ends = fitted(weight, grid, tile, torch.bfloat16, alignment=alignment)
    assert (ends[0] <= 0).all() and (ends[1] >= 0).all()
    ours, plain = (loss(weight, written(weight, e, grid, tile), tile, alignment) for e in (ends, minmax(weight, tile)))
    assert (ours <= plain * (1 + 1e-5) + 1e-12 * scale**2).all()


@pytest.mark.parametrize("alignment", [0.0, 16.0])
@pytest.mark.parametrize(
    "grid", [Grid.integers(2, False), Grid.integers(3, False), Grid.integers(3, True), Grid.integers(4, True)], ids=str
)
def test_hardly_worse_than_every_range_tried(grid: Grid, alignment: float) -> None:
    weight, tile = heavy(16, 128), Tile(1, -1)
    ours = loss(
        weight,
        written(weight, fitted(weight, grid, tile, torch.float32, alignment=alignment), grid, tile),
        tile,
        alignment,
    )
    low, high = minmax(weight, tile)
    best = torch.full_like(ours, torch.inf)
    shares = torch.linspace(0.05, 1.1, 80).tolist()
    for a in shares:
        for b in [a] if grid.symmetric else shares:
            tried = written(weight, (a * low, b * high), grid, tile, torch.float32)
            best = torch.minimum(best, loss(weight, tried, tile, alignment))
    assert (ours.sum() / best.sum()) < 1.03


@pytest.mark.parametrize("bits", [5, 6, 7, 8])
def test_at_many_bits_ranges_are_tried_near_the_whole(bits: int) -> None:
    """There the least error lies within a few steps of min-max, and moves with each of them."""
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    tile, grid = Tile(1, -1), Grid.integers(bits, True)
    found = written(weight, fitted(weight, grid, tile, torch.float32, alignment=0.0), grid, tile)
    low, high = minmax(weight, tile)
    shares = torch.linspace(0.5, 1.05, 400).tolist()
    tried = [loss(weight, written(weight, (a * low, a * high), grid, tile), tile, 0.0) for a in shares]
    assert loss(weight, found, tile, 0.0).sum() / torch.stack(tried).amin(0).sum() < 1.018


def test_clipping_makes_weights_smaller_and_alignment_holds_them() -> None:
    """What the second term is for: at 2 bits the least squared error shrinks a tile, the aligned one hardly does."""
    weight, grid, tile = heavy(64, 128), Grid.integers(2, False), Tile(1, -1)
    kept = []
    for alignment in (0.0, 16.0):
        found = written(weight, fitted(weight, grid, tile, torch.float32, alignment=alignment), grid, tile)
        kept.append(float((found * weight).sum() / (weight * weight).sum()))
    assert kept[0] < 0.9
    assert kept[0] + 0.05 < kept[1] < 1.02


@pytest.mark.parametrize(
    "grid",
    [Grid.integers(2, False), Grid.integers(4, True), Grid.integers(8, False), Grid.with_signed_scale(2)],
    ids=str,
)
@pytest.mark.parametrize("value", [0.0, 0.3, -0.7, 1e-30])
def test_a_tile_of_one_value_is_exact(grid: Grid, value: float) -> None:
    weight = torch.full((32, 64), value, dtype=torch.bfloat16)
    weight[0, :32] = 0
    for tile in TILES:
        ends = fitted(weight, grid, tile, torch.bfloat16, alignment=16.0)
        assert torch.equal(written(weight, ends, grid, tile).bfloat16(), weight)


@pytest.mark.parametrize("alignment", [0.0, 16.0])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_scale_with_a_sign_is_hardly_worse_than_every_step_tried_both_ways(bits: int, alignment: float) -> None:
    grid, tile = Grid.with_signed_scale(bits), Tile(1, 40, ragged=True)
    weight = heavy(16, 100)
    ends = fitted(weight, grid, tile, torch.float16, alignment=alignment)
    ours = loss(weight, written(weight, ends, grid, tile, torch.float16), tile, alignment)
    plain = loss(weight, written(weight, minmax(weight, tile), grid, tile, torch.float16), tile, alignment)
    assert (ours <= plain * (1 + 1e-5)).all()
    most, best = tiled(weight, tile).abs().amax((1, 3)), torch.full_like(ours, torch.inf)
    for share in torch.linspace(0.05, 1.1, 160).tolist():
        for sign in (1.0, -1.0):
            h = (sign * share * most / (-grid.qmin)).half()
            made = dequantize(quantize(weight, h, None, grid, tile), h.float(), None, tile)
            best = torch.minimum(best, loss(weight, made, tile, alignment))
    assert (ours.sum() / best.sum()) < 1.03
    scale = affine(*ends, grid, torch.float16)[0]
    assert (scale > 0).any() and (scale < 0).any()


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("signed_scale", [False, True])
def test_the_papers_descent_ends_below_min_max_and_not_below_ours(bits: int, tile: Tile, signed_scale: bool) -> None:
    weight, grid = heavy(32, 64), Grid.with_signed_scale(bits) if signed_scale else Grid.integers(bits, True)
    found = [
        loss(weight, written(weight, ends, grid, tile), tile, 0.0).sum()
        for ends in (
            minmax(weight, tile),
            by_gradient(weight, grid, tile, torch.bfloat16),
            fitted(weight, grid, tile, torch.bfloat16, alignment=0.0),
        )
    ]
    assert found[1] < found[0]
    assert found[2] <= found[1] * 1.001


def test_the_papers_gradient_is_that_of_its_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of Adam goes by its rate against the gradient's sign, here taken from the loss itself."""
    weight, grid, tile = heavy(4, 64), Grid.integers(4, True), Tile(1, -1)
    start = affine(*minmax(weight, tile), grid, torch.float32)[0]
    h = start.clone().requires_grad_()
    q = (weight / h).round().clamp(grid.qmin, grid.qmax).detach()
    (weight - h * q).square().sum().backward()
    assert h.grad is not None
    monkeypatch.setattr(range_gradient, "STEPS", 1)
    _, high = by_gradient(weight, grid, tile, torch.float32)
    assert torch.equal((high / (grid.steps / 2) - start).sign(), -h.grad.sign())


def test_another_norm_is_the_least_of_what_it_counts() -> None:
    weight, grid, tile = heavy(16, 64), Grid.integers(3, False), Tile(1, 32)
    found = {
        p: written(weight, nearest_to_weights(weight, grid, tile, torch.float32, norm=p), grid, tile, torch.float32)
        for p in (1.0, 2.0, 3.0)
    }
    for p in found:
        sums = {other: float((made - weight).abs().pow(p).sum()) for other, made in found.items()}
        assert min(sums, key=lambda other: sums[other]) == p


@pytest.mark.parametrize("tile", [Tile(1, 128), Tile(1, -1), Tile(-1, -1)], ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_same_with_any_number_of_threads_and_however_weights_are_split(
    bits: int, tile: Tile, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, found, threads = heavy(96, 1024), [], torch.get_num_threads()
    try:
        for count, together, part in ((1, 2**21, 2**17), (2, 2**21, 2**17), (1, 2**14, 2**10), (2, 2**12, 2**12)):
            torch.set_num_threads(count)
            monkeypatch.setattr(range_fit, "TOGETHER", together)
            monkeypatch.setattr(range_fit, "PART", part)
            found.append(torch.stack(fitted(weight, Grid.integers(bits, False), tile, torch.bfloat16, alignment=16.0)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_magnitudes_that_the_scales_dtype_does_not_hold_are_no_trouble() -> None:
    weight, grid, tile = heavy(8, 64).bfloat16() * 1e30, Grid.integers(4, False), Tile(1, -1)
    weight[1] = 1e6
    assert all(end.isfinite().all() for end in fitted(weight, grid, tile, torch.float16, alignment=16.0))
