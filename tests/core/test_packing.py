"""Packing against compressed-tensors' own functions, and back."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given
from hypothesis import strategies as st

from bitwright.core import packing
from bitwright.core.grid import Grid
from bitwright.core.packing import pack, pack_down, unpack, unpack_down


def codes_of(grid: Grid, rows: int, columns: int) -> torch.Tensor:
    kind = torch.int8 if grid.symmetric else torch.uint8
    drawn = torch.randint(grid.qmin, grid.qmax + 1, (rows, columns), generator=torch.Generator().manual_seed(rows))
    return drawn.to(kind)


@given(st.integers(2, 8), st.booleans(), st.integers(1, 9), st.integers(1, 140))
def test_the_librarys_words_and_back(bits: int, symmetric: bool, rows: int, columns: int) -> None:
    grid = Grid.integers(bits, symmetric)
    codes = codes_of(grid, rows, columns)
    signed = codes if symmetric else (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    words = pack(codes, grid)
    assert torch.equal(words, pack_to_int32(signed, bits))
    assert torch.equal(unpack(words, grid, columns), codes)
    down = pack_down(codes, grid)
    assert torch.equal(down, pack_to_int32(signed, bits, packed_dim=0))
    assert torch.equal(unpack_down(down, grid, rows), codes)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_few_rows_at_a_time(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Grid.integers(3, symmetric)
    codes = codes_of(grid, 11, 50)
    whole = pack(codes, grid)
    monkeypatch.setattr(packing, "TOGETHER", 100)
    assert torch.equal(pack(codes, grid), whole)
    assert torch.equal(unpack(whole, grid, 50), codes)


def test_by_hand() -> None:
    """Codes 1, 2, 3 of 4 bits are 0x321; of 3 bits, 1 + 2 * 8 + 3 * 64 = 209; symmetric -8 is stored as 0, 7 as 15."""
    codes = torch.tensor([[1, 2, 3]], dtype=torch.uint8)
    assert pack(codes, Grid.integers(4)).tolist() == [[0x321]]
    assert pack(codes, Grid.integers(3)).tolist() == [[209]]
    assert pack(torch.tensor([[-8, 7]], dtype=torch.int8), Grid.integers(4, symmetric=True)).tolist() == [[0xF0]]
