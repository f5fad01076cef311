"""Layouts of blocks: a block worked out by hand, and the gguf library's own decoder."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize

from bitwright.formats.gguf.blocks import KINDS, nbytes_of, nearest, packed, valued


def drawn(kind: Kind, rows: int = 5, columns: int = 96) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Levels over the whole range, scales of both signs."""
    generator = torch.Generator().manual_seed(1)
    levels = torch.randint(KINDS[kind].lowest, KINDS[kind].highest + 1, (rows, columns), generator=generator)
    d, m = torch.randn(2, rows, columns // 32, generator=generator).half()
    return levels.to(torch.int16), d, m if kind is Kind.Q4_1 else None


def test_blocks_by_hand() -> None:
    """Numbers i and i + 16 share a byte; 0.5 is 00 38 in float16, -1.5 is 00 be, little endian."""
    half, minimum = torch.tensor([[0.5]]).half(), torch.tensor([[-1.5]]).half()
    up = torch.arange(32)[None] % 16
    nibbles = "00 11 22 33 44 55 66 77 88 99 aa bb cc dd ee ff"
    assert packed(up - 8, half, None, Kind.Q4_0).tobytes() == bytes.fromhex("00 38" + nibbles)
    assert packed(up, half, minimum, Kind.Q4_1).tobytes() == bytes.fromhex("00 38 00 be" + nibbles)
    down = -128 + torch.arange(32)[None] * 8
    signed = "80 88 90 98 a0 a8 b0 b8 c0 c8 d0 d8 e0 e8 f0 f8 00 08 10 18 20 28 30 38 40 48 50 58 60 68 70 78"
    assert packed(down, half, None, Kind.Q8_0).tobytes() == bytes.fromhex("00 38" + signed)


@pytest.mark.parametrize("kind", KINDS)
def test_the_librarys_decoder_reads_what_was_meant(kind: Kind) -> None:
    fitted = drawn(kind)
    data = packed(*fitted, kind)
    assert data.shape == (5, 3 * KINDS[kind].nbytes) == (5, nbytes_of((96,), kind))
    np.testing.assert_array_equal(dequantize(data, kind), valued(*fitted).numpy())


@pytest.mark.parametrize("kind", KINDS)
def test_weights_quantized_anew_lose_no_more_than_by_the_librarys_rounding(kind: Kind) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(2)) * 0.02
    ours = dequantize(packed(*nearest(weight, kind), kind), kind)
    theirs = dequantize(quantize(weight.numpy(), kind), kind)
    lost, wanted = (np.square(each - weight.numpy()).sum() for each in (ours, theirs))
    assert lost <= wanted * 1.001
    assert np.square(ours).sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_what_is_too_small_for_float16(kind: Kind) -> None:
    weight = torch.zeros(2, 64)
    weight[1] = 1e-12
    found = dequantize(packed(*nearest(weight, kind), kind), kind)
    assert np.isfinite(found).all()
    assert np.abs(found).max() <= 1e-7
