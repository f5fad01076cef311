"""SentencePiece's model file, read as far as GGUF repeats it: pieces with score and type, and three settings.

A tokenizer.model is a message of protocol buffers: fields, each a number and a type in a varint, then a varint, 4 or 8
bytes, or a length and as many bytes. Pieces are field 1 (text 1, score 2, type 3); the trainer's settings are field 2
(kind of model 3: 1 unigram, 2 BPE), the normalizer's field 3 (dummy prefix 3, remove extra spaces 4).
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bitwright.core.errors import CheckpointError

BPE = 2
MOST_PIECES = 2**19  # the largest vocabularies have 262,144
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""The types of pieces; GGUF has the same numbers for them."""
VARINT, EIGHT, BYTES, FOUR = 0, 1, 2, 5


@dataclass(frozen=True)
class Piece:
    """A token: its text, with U+2581 for a space, its score and its type."""

    text: str
    score: float
    type: int


@dataclass(frozen=True)
class SentencePieces:
    """A model's pieces in the order of their ids, its kind, and how text is prepared."""

    pieces: tuple[Piece, ...]
    kind: int
    dummy_prefix: bool
    remove_extra_spaces: bool


def parse(raw: bytes, where: str) -> SentencePieces:
    """Read the model in a file's bytes. Raises CheckpointError, which begins with ``where``, for anything else."""
    pieces: list[Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for field, value in _fields(raw):
            if field == 1:
                pieces.append(_piece(value))
                if len(pieces) > MOST_PIECES:
                    raise ValueError(f"more than {MOST_PIECES:,} pieces")
            elif field == 2:
                trainer = dict(_fields(value))
            elif field == 3:
                normalizer = dict(_fields(value))
    except (IndexError, struct.error, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{where}: no SentencePiece model ({error}); the file is damaged, fetch it again"
        ) from None
    if not pieces:
        raise CheckpointError(f"{where}: a SentencePiece model without pieces; the file is damaged, fetch it again")
    kind, prefix, spaces = trainer.get(3, 1), normalizer.get(3, 1), normalizer.get(4, 1)
    return SentencePieces(tuple(pieces), int(kind), bool(prefix), bool(spaces))


def _piece(raw: bytes) -> Piece:
    fields = dict(_fields(raw))
    return Piece(fields[1].decode("utf-8"), float(fields.get(2, 0.0)), int(fields.get(3, NORMAL)))


def _fields(raw: bytes) -> Iterator[tuple[int, Any]]:
    """Yield number and value of each field: an int, a float, or bytes."""
    at = 0
    while at < len(raw):
        key, at = _varint(raw, at)
        kind = key & 7
        if kind == VARINT:
            value, at = _varint(raw, at)
            yield key >> 3, value
        elif kind in (FOUR, EIGHT):
            size = 4 if kind == FOUR else 8
            yield key >> 3, struct.unpack_from("<f" if size == 4 else "<d", raw, at)[0]
            at += size
        elif kind == BYTES:
            length, at = _varint(raw, at)
            if at + length > len(raw):
                raise ValueError("it ends within a field")
            yield key >> 3, raw[at : at + length]
            at += length
        else:
            raise ValueError(f"a field of type {kind}")


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """Read a number in seven bits a byte, the lowest first; the last byte has no upper bit."""
    value = 0
    for shift in range(0, 70, 7):
        byte = raw[at]
        value, at = value | (byte & 0x7F) << shift, at + 1
        if byte < 0x80:
            return value, at
    raise ValueError("a number that does not end")
