"""Codes <-> dense 32-bit words, as compressed-tensors lays them out: code c of a row takes bits c*b to (c+1)*b - 1.

Codes are stored as 0 to 2^b - 1: the smallest code of the grid, -2^(b-1) on most symmetric ones, is subtracted. Bit p
of a row is bit p % 32 of its word p // 32, which in little-endian memory is bit p % 8 of byte p // 8: eight codes make
exactly b bytes.
"""

import sys
from math import ceil

import torch
from jaxtyping import Int, Int32, UInt8
from torch import Tensor

from bitwright.core.grid import Grid

WORD_BITS, BYTE_BITS, WORD_BYTES = 32, 8, 4
TOGETHER = 2**20
"""The number of codes packed at a time, which bounds the temporaries."""


def pack(codes: Int[Tensor, "R C"], grid: Grid) -> Int32[Tensor, "R W"]:
    """Pack each row of codes into words, W = ceil(C * bits / 32); unused bits of a row's last word are zeros."""
    rows, columns = codes.shape
    words = torch.empty(rows, ceil(columns * grid.bits / WORD_BITS), dtype=torch.int32, device=codes.device)
    for here in _few(rows, columns):
        stored = codes[here].view(torch.uint8) - grid.qmin  # wraps around
        words[here] = _packed(stored, grid.bits, words.shape[1])
    return words


def unpack(words: Int32[Tensor, "R W"], grid: Grid, columns: int) -> Int[Tensor, "R C"]:
    """Unpack each row of words into codes: uint8, or int8 on a symmetric grid."""
    stored = torch.empty(len(words), columns, dtype=torch.uint8, device=words.device)
    for here in [slice(None)] if words.is_meta else _few(len(words), columns):
        stored[here] = _unpacked(words[here], grid.bits, columns)
    return (stored + grid.qmin).view(torch.int8) if grid.symmetric else stored


def pack_down(codes: Int[Tensor, "R C"], grid: Grid) -> Int32[Tensor, "W C"]:
    """Pack each column of codes into words, as zero points are stored."""
    return pack(codes.t().contiguous(), grid).t().contiguous()


def unpack_down(words: Int32[Tensor, "W C"], grid: Grid, rows: int) -> Int[Tensor, "R C"]:
    """Unpack each column of words into codes."""
    return unpack(words.t().contiguous(), grid, rows).t().contiguous()


def unpack_apart(words: Int32[Tensor, "R W"], bits: int, columns: int) -> UInt8[Tensor, "R C"]:
    """Unpack rows in which no code crosses two words: each word holds as many whole codes as fit, from its lowest bit.

    Older releases of compressed-tensors packed 3, 5, 6 and 7 bits this way.
    """
    shifts = torch.arange(0, WORD_BITS - bits + 1, bits, dtype=torch.int32, device=words.device)
    codes = (words[..., None] >> shifts).bitwise_and_(2**bits - 1).to(torch.uint8)
    return codes.reshape(len(words), -1)[:, :columns]


def _few(rows: int, columns: int) -> list[slice]:
    at_once = max(1, TOGETHER // max(1, columns))
    return [slice(start, start + at_once) for start in range(0, rows, at_once)]


def _pieces(bits: int) -> list[tuple[int, int, int]]:
    """The bytes that each of eight codes falls into, as (code, byte, shift): shift up if positive, down if negative."""
    pieces = []
    for number in range(BYTE_BITS):
        byte, shift = divmod(number * bits, BYTE_BITS)
        pieces.append((number, byte, shift))
        if shift + bits > BYTE_BITS:
            pieces.append((number, byte + 1, shift - BYTE_BITS))
    return pieces


def _packed(codes: UInt8[Tensor, "R C"], bits: int, words: int) -> Int32[Tensor, "R W"]:
    rows, columns = codes.shape
    eights = ceil(words * WORD_BYTES / bits)
    codes = torch.nn.functional.pad(codes, (0, eights * BYTE_BITS - columns)).view(rows, eights, BYTE_BITS)
    stored = torch.zeros(rows, eights, bits, dtype=torch.uint8, device=codes.device)
    for number, byte, shift in _pieces(bits):  # bits that do not fit into a byte fall off
        stored[..., byte] |= codes[..., number] << shift if shift >= 0 else codes[..., number] >> -shift
    stored = _little_endian(stored.view(rows, eights * bits)[:, : words * WORD_BYTES])
    return stored.reshape(-1).view(torch.int32).view(rows, words)


def _unpacked(words: Int32[Tensor, "R W"], bits: int, columns: int) -> UInt8[Tensor, "R C"]:
    stored = _little_endian(words.reshape(-1).view(torch.uint8).view(len(words), -1))
    rows, eights = len(words), ceil(columns / BYTE_BITS)
    missing = max(0, eights * bits - stored.shape[1])
    stored = torch.nn.functional.pad(stored, (0, missing))[:, : eights * bits].view(rows, eights, bits)
    codes = torch.zeros(rows, eights, BYTE_BITS, dtype=torch.uint8, device=words.device)
    for number, byte, shift in _pieces(bits):
        codes[..., number] |= stored[..., byte] >> shift if shift >= 0 else stored[..., byte] << -shift
    return codes.bitwise_and_(2**bits - 1).view(rows, -1)[:, :columns]


def _little_endian(stored: UInt8[Tensor, "R bytes"]) -> UInt8[Tensor, "R bytes"]:
    if sys.byteorder == "little":
        return stored
    return stored.view(len(stored), -1, WORD_BYTES).flip(-1).reshape(stored.shape)
