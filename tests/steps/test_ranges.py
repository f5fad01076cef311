import pytest
import torch

from bitwright.core import panels
from bitwright.core.grid import FULL, Tile
from bitwright.core.qtensor import affine, dequantize, quantize, tiled
from bitwright.core.scheme import Scheme
from bitwright.steps.ranges import SHARES, minmax, nearest_to_weights

WEIGHT = torch.tensor([[1.0, -2.0, 3.0, 4.0], [-5.0, -6.0, 0.5, 8.0]])


@pytest.mark.parametrize(
    ("tile", "low", "high"),
    [
        (Tile(1, FULL), [[-2.0], [-6.0]], [[4.0], [8.0]]),
        (Tile(1, 2), [[-2.0, 3.0], [-6.0, 0.5]], [[1.0, 4.0], [-5.0, 8.0]]),
        (Tile(2, 1), [[-5.0, -6.0, 0.5, 4.0]], [[1.0, -2.0, 3.0, 8.0]]),
        (Tile(FULL, FULL), [[-6.0]], [[8.0]]),
        (Tile(2, 2), [[-6.0, 0.5]], [[1.0, 8.0]]),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_smallest_and_largest_of_each_tile(
    dtype: torch.dtype, tile: Tile, low: list[list[float]], high: list[list[float]]
) -> None:
    found = minmax(WEIGHT.to(dtype), tile)
    assert (found[0].tolist(), found[1].tolist()) == (low, high)
    assert found[0].dtype == found[1].dtype == torch.float32


@pytest.mark.parametrize("text", ["W2A16", "W3A16", "W2A16sym"])
@pytest.mark.parametrize("tile", [Tile(1, FULL), Tile(1, 16), Tile(8, 1), Tile(FULL, FULL)], ids=str)
def test_no_pair_of_shares_is_nearer_than_the_one_found(text: str, tile: Tile) -> None:
    weight, grid = torch.randn(16, 32, generator=torch.Generator().manual_seed(2)) ** 3, Scheme.parse(text).weight
    ends = minmax(weight, tile)

    def lost(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        scale, zero = affine(low, high, grid, torch.bfloat16)
        codes = quantize(weight, scale, zero, grid, tile)
        error = (weight - dequantize(codes, scale.float(), zero, tile)).square()
        p, q = tile.counts((16, 32))
        return error.view(p, 16 // p, q, 32 // q).sum((1, 3))

    found = lost(*nearest_to_weights(weight, grid, tile, torch.bfloat16))
    tried = torch.stack([lost(a * ends[0], b * ends[1]) for a in SHARES for b in SHARES])
    assert torch.allclose(found, tried.amin(0), rtol=1e-4)
    assert (found < 0.95 * tried[-1]).any(), "somewhere min-max is not the best"


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16g32", "W4A16g32ic"])
def test_the_gradient_of_min_and_max_is_torchs(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole numbers, so that many weights share an end; panels smaller than the weight."""
    monkeypatch.setattr(panels, "CACHED", 1024)
    tile, generator = Scheme.parse(scheme).tile, torch.Generator().manual_seed(1)
    weight = (3 * torch.randn(128, 64, generator=generator)).round().requires_grad_()
    ours, tiles = minmax(weight, tile), tiled(weight, tile)
    torchs = tiles.amin(dim=(1, 3)), tiles.amax(dim=(1, 3))
    gradients = [torch.randn(end.shape, generator=generator) for end in torchs]
    found, wanted = (torch.autograd.grad(ends, weight, gradients)[0] for ends in (ours, torchs))
    torch.testing.assert_close(found, wanted)
