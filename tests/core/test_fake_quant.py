"""The written-out gradients of fake quantization, against autograd on the same steps."""

import pytest
import torch
from torch import Tensor

from bitwright.core import fake_quant, panels
from bitwright.core.fake_quant import FakeQuantizer, fake_quantize, fake_quantize_tokens
from bitwright.core.grid import Grid, Tile
from bitwright.core.qtensor import affine, dequantize, quantize, tiled
from bitwright.core.scheme import Scheme
from bitwright.steps.ranges import minmax

Given = tuple[Tensor, Tensor, Tensor]
"""A weight and the two ends of its ranges."""
SCHEMES = ["W2A16g32", "W4A16", "W3A16sym", "W2A16g32sym", "W3A16g32ic"]


def left_to_autograd(weight: Tensor, low: Tensor, high: Tensor, scheme: Scheme) -> Tensor:
    """Codes and zero points as constants, W / h with the gradient of the exact quotient; what is clipped follows the
    end of its range, on a symmetric grid its code times h."""
    grid, symmetric = scheme.weight, scheme.weight.symmetric
    low, high = low[:, None, :, None], high[:, None, :, None]
    h = 2 * torch.maximum(-low, high) / grid.steps if symmetric else (high - low) / grid.steps
    z = torch.zeros_like(h) if symmetric else (-low / h).round().detach()
    ratio = tiled(weight, scheme.tile) / h
    code = ratio.detach().round() + z
    level = code.clamp(grid.qmin, grid.qmax) - z
    inside = (level + ratio - ratio.detach()) * h
    above, below = (level * h, level * h) if symmetric else (high, low)
    made = torch.where(code > grid.qmax, above, torch.where(code < grid.qmin, below, inside))
    return made.reshape(weight.shape)


def drawn(scheme: Scheme) -> tuple[Given, Tensor]:
    """A weight, ranges that clip some of it, and the gradient that arrives."""
    generator = torch.Generator().manual_seed(1)
    weight, gradient = (torch.randn(64, 96, generator=generator) for _ in range(2))
    low, high = clipping(weight, scheme.tile)
    return (weight.requires_grad_(), low, high), gradient


def clipping(weight: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    low, high = ((end.detach() * 0.7).requires_grad_() for end in minmax(weight, tile))
    return low, high


@pytest.mark.parametrize("name", SCHEMES)
def test_gradients_are_those_of_the_formula(name: str) -> None:
    scheme = Scheme.parse(name)
    given, gradient = drawn(scheme)
    made = fake_quantize(*given, scheme.weight, scheme.tile, torch.float32)
    wanted = left_to_autograd(*given, scheme)
    scale, zero = affine(*given[1:], scheme.weight, torch.float32)
    codes = quantize(given[0], scale, zero, scheme.weight, scheme.tile)
    torch.testing.assert_close(made, dequantize(codes, scale, zero, scheme.tile))
    for found, expected in zip(*(torch.autograd.grad(x, given, gradient) for x in (made, wanted)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SCHEMES)
def test_panels_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = Scheme.parse(name)
    given, gradient = drawn(scheme)

    def found() -> list[Tensor]:
        made = fake_quantize(*given, scheme.weight, scheme.tile, torch.float32)
        return [made, *torch.autograd.grad(made, given, gradient)]

    whole = found()
    monkeypatch.setattr(panels, "CACHED", 1024)
    assert all(torch.equal(a, b) for a, b in zip(whole, found(), strict=True))


@pytest.mark.parametrize("name", SCHEMES)
def test_a_short_dtype_rounds_and_no_more(name: str) -> None:
    """The same codes, and gradients as near as two roundings to 8 binary digits leave them."""
    scheme = Scheme.parse(name)
    given, gradient = drawn(scheme)
    made, short = (fake_quantize(*given, scheme.weight, scheme.tile, torch.float32, dtype) for dtype in (
        torch.float32, torch.bfloat16))  # fmt: skip
    assert short.dtype == torch.bfloat16 and torch.equal(short, made.bfloat16())
    for x, want in zip(
        torch.autograd.grad(short, given, gradient.bfloat16()), torch.autograd.grad(made, given, gradient), strict=True
    ):
        assert x.dtype == torch.float32
        assert (x - want).norm() < 5e-3 * want.norm()


def test_what_is_clipped_keeps_its_side_however_far_away() -> None:
    scheme = Scheme.parse("W2A16")
    weight = torch.tensor([[-1e30, 1e30, 0.1, 0.2]], requires_grad=True)
    low, high = (torch.tensor([[end]], requires_grad=True) for end in (-1.0, 1.0))
    made = fake_quantize(weight, low, high, scheme.weight, scheme.tile, torch.float32, torch.bfloat16)
    found = torch.autograd.grad(made, (weight, low, high), torch.tensor([[1.0, 8.0, 0.0, 0.0]]).bfloat16())
    assert [x.flatten().tolist() for x in found] == [[0.0, 0.0, 0.0, 0.0], [1.0], [8.0]]


def test_autocast_leaves_the_codes_of_activations_alone() -> None:
    x = torch.randn(4, 512, generator=torch.Generator().manual_seed(2)).bfloat16()
    wanted = fake_quantize_tokens(x.float(), Grid.integers(8))
    with torch.autocast("cpu", torch.bfloat16):
        found = fake_quantize_tokens(x, Grid.integers(8))
    assert torch.equal(found, wanted)
    assert fake_quantize_tokens(x, Grid.integers(8)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_is_as_alone(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of several shapes, some of them small enough to go together; one with a tile of its own."""
    scheme = Scheme.parse(name)
    grid, generator = scheme.weight, torch.Generator().manual_seed(2)
    shapes, tiles = [(64, 96), (32, 96), (128, 32), (96, 64), (256, 96)], [scheme.tile] * 4 + [Tile(32, 1)]
    monkeypatch.setattr(fake_quant, "SMALL", 64 * 96)
    weights = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    ranges = [clipping(w, t) for w, t in zip(weights, tiles, strict=True)]
    gradients = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    found = FakeQuantizer(tiles, [grid] * len(tiles), torch.bfloat16, dtype)(weights, ranges)
    for weight, ends, tile, gradient, made in zip(weights, ranges, tiles, gradients, found, strict=True):
        alone = fake_quantize(weight, *ends, grid, tile, torch.bfloat16, dtype)
        assert made.dtype == dtype and torch.equal(made, alone)
        given = (weight, *ends)
        ours, expected = (torch.autograd.grad(x, given, gradient, retain_graph=True) for x in (made, alone))
        for one, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_steps_on_other_weights() -> None:
    """Weights of the step before are not taken for those of this one; the same ones are not put together again."""
    scheme = Scheme.parse("W3A16g32")
    fake = FakeQuantizer([scheme.tile] * 2, [scheme.weight] * 2, torch.bfloat16)
    first, second, third = torch.randn(3, 16, 64).unbind()

    def check(*weights: Tensor) -> None:
        ranges = [minmax(weight, scheme.tile) for weight in weights]
        for weight, ends, made in zip(weights, ranges, fake(weights, ranges), strict=True):
            assert torch.equal(made, fake_quantize(weight, *ends, scheme.weight, scheme.tile, torch.bfloat16))

    for weights in ((first, second), (first, second), (first, third), (third, first)):
        check(*weights)
