"""GGUF files whose lengths and counts are a stranger's: refused before anything of such a size is read."""

import os
from pathlib import Path
from struct import pack

import pytest

from bitwright.core.errors import CheckpointError
from bitwright.formats.gguf import header, sentencepiece
from bitwright.formats.gguf.base_file import Base
from bitwright.formats.gguf.header import read_header
from bitwright.formats.gguf.sentencepiece import parse

SPARSE = 2**40
BYTE, STRING, ARRAY = 0, 8, 9


def text(value: bytes) -> bytes:
    return pack("<Q", len(value)) + value


def file(tensors: int, keys: int, rest: bytes) -> bytes:
    return b"GGUF" + pack("<IQQ", 3, tensors, keys) + rest


def listed(element: int, count: int) -> bytes:
    return file(0, 1, text(b"list") + pack("<IIQ", ARRAY, element, count))


@pytest.mark.parametrize(("raw", "says"), [
    (listed(STRING, 20_000_000), "has more than 1,048,576 texts, keys and tensors"),
    (listed(STRING, 2**60), "has more than 1,048,576 texts, keys and tensors"),
    (listed(ARRAY, 2**60), "is a list of type 9, which is not read"),
    (listed(BYTE, 2**39), "its header has more than 268,435,456 bytes"),
    (listed(BYTE, 2**64 - 1), "its header has more than|is cut short"),
    (file(0, 1, text(b"key") + pack("<IQ", STRING, 2**35)), "is a text of 34,359,738,368 bytes, and 16,777,216"),
    (file(2**60, 0, b""), "is of shape"), (file(0, 2**60, b""), "twice"),
    (file(1, 0, text(b"a") + pack("<I4QIQ", 4, *[2**63] * 4, 0, 0)), "is cut short: a ends at byte"),
    (file(1, 0, text(b"a") + pack("<I4QIQ", 2**31, *[2**63] * 4, 0, 0)), "is of shape"),
], ids=["none", "texts", "lists", "bytes", "most bytes", "text", "tensors", "keys", "sizes", "dimensions"])  # fmt: skip
def test_counts_of_a_stranger(raw: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(raw)
    os.truncate(tmp_path / "m.gguf", SPARSE)
    with pytest.raises(CheckpointError, match=says):
        read_header(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match=f"--base .*({says})"):
        Base.open(tmp_path / "m.gguf")


def test_many_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "MOST_ENTRIES", 100)
    tensors = b"".join(text(b"%d" % n) + pack("<IQIQ", 1, 8, 0, 32 * n) for n in range(101))
    (tmp_path / "m.gguf").write_bytes(file(101, 0, tensors))
    with pytest.raises(CheckpointError, match="has more than 100 texts, keys and tensors"):
        read_header(tmp_path / "m.gguf")


def test_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match="a named pipe, not a regular file"):
        read_header(tmp_path / "m.gguf")


def test_pieces_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentencepiece, "MOST_PIECES", 1000)
    with pytest.raises(CheckpointError, match="more than 1,000 pieces"):
        parse(b"\x0a\x03\x0a\x01a" * 1001, "tokenizer.model")
