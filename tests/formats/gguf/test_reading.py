"""GGUF files read back: every architecture and type, and every way in which a file can be damaged."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGUFReader, GGUFWriter
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from tests.formats.gguf.conftest import KINDS, Models

import bitwright
from bitwright.core.engine_file import unlike
from bitwright.core.errors import CheckpointError
from bitwright.core.format import WriteOptions
from bitwright.core.grid import Grid
from bitwright.formats import QuantizedFolder, gguf
from bitwright.formats.gguf.blocks import SCALES
from bitwright.formats.gguf.header import Listed, read_header, read_list
from bitwright.formats.gguf.reading import GgufFile, opened

Q = "model.layers.0.self_attn.q_proj"
SCHEMES = ("W4A16g32sym", "W4A16g32", "W3A16", "W5A16sym", "W2A16g32")


def written(folder: Path, output: Path) -> GgufFile:
    gguf.write(QuantizedFolder.open(folder), output, WriteOptions())
    return opened(output)


def random_file(output: Path, kind: Kind, rows: int = 3, columns: int = 512, **says: Any) -> Path:
    """A file of one tensor, blocks of random bytes."""
    block, nbytes = GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(5).integers(0, 60, (rows, columns // block * nbytes), np.uint8)
    writer = GGUFWriter(output, says.pop("architecture", "gemma2"))
    for key, value in says.items():
        writer.add_uint16(key.replace("_", "."), value)
    writer.add_tensor("blk.0.ffn_down.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return output


@pytest.mark.parametrize("name", KINDS)
def test_every_tensor_of_every_architecture_is_found_again(name: str, quantized: Models, tmp_path: Path) -> None:
    folder = quantized(name, "W4A16g32")
    file, model = written(folder, tmp_path / "m.gguf"), QuantizedFolder.open(folder)
    wanted = file.wanted
    assert wanted is not None and not file.unknown and file.misfiled is None
    assert set(wanted.needed) <= set(file.tensors) <= {*wanted.needed, *wanted.allowed}
    for tensor in file.tensors.values():
        assert {**wanted.needed, **wanted.allowed}[tensor.name] == tensor.shape
        assert file.numbers(tensor.name) is None
    assert file.unlike(model.config) == []
    passed = {
        one for one in model.passed if not (one == "lm_head.weight" and KINDS[name][2].get("tie_word_embeddings"))
    }
    assert set(file.names) == {*passed, *(f"{linear}.weight" for linear in model.linears)}
    for one in model.passed:
        if len(model.shape(one)) == 1:
            assert torch.equal(torch.cat([values for _, values in file.values(one)]).sort().values,
                               model.tensor(one).float().sort().values)  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_codes_scales_and_values_are_those_of_the_folder(
    name: str, scheme: str, quantized: Models, tmp_path: Path
) -> None:
    folder = quantized(name, scheme)
    file, model = written(folder, tmp_path / "m.gguf"), QuantizedFolder.open(folder)
    assert len(model.linears) == 14
    for linear in model.linears:
        weight = model.read(linear)
        assert [unlike(weight, rows, found) for rows, found in file.levels(f"{linear}.weight")] == [None]
        for rows, values in file.values(f"{linear}.weight"):
            torch.testing.assert_close(values, weight.dequantize(torch.float32)[rows], rtol=1e-3, atol=1e-3)


def test_what_is_not_as_it_was_is_seen(quantized: Models, tmp_path: Path) -> None:
    folder = quantized("llama", "W4A16g32")
    file, model = written(folder, tmp_path / "m.gguf"), QuantizedFolder.open(folder)
    weight, ((rows, found),) = model.read(Q), file.levels(f"{Q}.weight")
    assert weight.zero is not None and weight.grid == Grid.integers(4)
    for change, said in ((weight.codes, "codes"), (weight.zero, "minima"), (weight.scale, "scales")):
        before = change[7, 1].clone()
        change[7, 1] = before * 2 + 1
        assert unlike(weight, rows, found) == said
        change[7, 1] = before
    assert unlike(weight, rows, found) is None
    assert unlike(weight, slice(None), found) is not None  # rows of q are turned


@pytest.mark.parametrize("kind", SCALES, ids=lambda kind: kind.name)
def test_where_the_scales_of_every_type_lie(kind: Kind, tmp_path: Path) -> None:
    path, (start, count) = random_file(tmp_path / "m.gguf", kind), SCALES[kind]
    file = opened(path)
    (tensor,) = GGUFReader(path).tensors
    assert file.numbers(tensor.name) is None and file.is_read(tensor.name)
    at = file.header.tensors[tensor.name]
    assert (at.start, at.nbytes) == (tensor.data_offset, tensor.n_bytes)
    nbytes = GGML_QUANT_SIZES[kind][1]
    for number in range(count):
        raw = bytearray(path.read_bytes())
        place = at.start + at.nbytes - nbytes + start + 2 * number  # of the last block
        raw[place : place + 2] = b"\x00\x7e"
        (damaged := tmp_path / f"{number}.gguf").write_bytes(raw)
        assert opened(damaged).numbers(tensor.name) == "NaN or infinite"
        values = dequantize(np.array(GGUFReader(damaged).tensors[0].data), kind)
        assert not np.isfinite(values[-1]).all() and np.isfinite(values[:-1]).all()
    hole = bytearray(path.read_bytes())
    hole[at.start : at.start + at.nbytes] = bytes(at.nbytes)
    path.write_bytes(hole)
    assert opened(path).numbers(tensor.name) == "all its scales are zero"


def test_bfloat16_and_types_that_are_not_read(tmp_path: Path) -> None:
    path = random_file(tmp_path / "b.gguf", Kind.BF16)
    assert opened(path).numbers("blk.0.ffn_down.weight") is None
    raw = bytearray(path.read_bytes())
    raw[-2:] = b"\x80\xff"  # minus infinity
    path.write_bytes(raw)
    assert opened(path).numbers("blk.0.ffn_down.weight") == "NaN or infinite"
    other = opened(random_file(tmp_path / "t.gguf", Kind.TQ2_0))
    assert not other.is_read("blk.0.ffn_down.weight")
    assert "gemma2" in other.unknown and other.names == () and other.wanted is None


def test_a_file_that_is_cut_short_anywhere(quantized: Models, tmp_path: Path) -> None:
    file = written(quantized("llama", "W4A16g32"), tmp_path / "m.gguf")
    raw, cut = file.path.read_bytes(), tmp_path / "cut.gguf"
    assert len(raw) == file.header.nbytes
    for length in [*range(0, len(raw), len(raw) // 200), len(raw) - 1]:
        cut.write_bytes(raw[:length])
        with pytest.raises(CheckpointError, match="is cut short" if length else "is no GGUF file"):
            opened(cut)


def test_a_header_with_any_byte_changed_is_refused_or_read(quantized: Models, tmp_path: Path) -> None:
    file = written(quantized("tied", "W4A16g32sym"), tmp_path / "m.gguf")
    raw, chance = file.path.read_bytes(), random.Random(3)
    begins = min(entry.start for entry in file.header.tensors.values())
    refused = read = 0
    for _ in range(400):
        changed = bytearray(raw)
        changed[chance.randrange(begins)] ^= 1 << chance.randrange(8)
        (damaged := tmp_path / "d.gguf").write_bytes(changed)
        try:
            file = opened(damaged)
            _ = file.unknown, file.wanted, file.names, file.misfiled, file.bits()  # nothing else may be raised
            read += 1
        except CheckpointError:
            refused += 1
    assert refused > 20 and read > 20


@pytest.mark.parametrize(("old", "new", "says"), [
    (b"GGUF\x03", b"GGUX\x03", r"is no GGUF file: it begins with b'GGUX'"),
    (b"GGUF\x03", b"GGUF\x63", r"is GGUF of version 99"),
    (b"blk.1.attn_q.weight", b"blk.0.attn_q.weight", r"has tensor blk\.0\.attn_q\.weight twice"),
    (b"llama.block_count", b"llama.block_coun\xff", r"is no text"),
    (b"general.type", b"general.name", r"says general\.name twice"),
], ids=["magic", "version", "twice", "text", "key"])  # fmt: skip
def test_one_clear_error(old: bytes, new: bytes, says: str, quantized: Models, tmp_path: Path) -> None:
    file = written(quantized("llama", "W4A16g32"), tmp_path / "m.gguf")
    raw = file.path.read_bytes()
    assert raw.count(old) == 1
    file.path.write_bytes(raw.replace(old, new))
    with pytest.raises(CheckpointError, match=says):
        opened(file.path)


def test_a_part_of_a_model_and_bytes_too_many(quantized: Models, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is one of 3 parts of a model"):
        opened(random_file(tmp_path / "s.gguf", Kind.Q4_0, split_count=3))
    file = written(quantized("llama", "W4A16g32"), tmp_path / "m.gguf")
    with file.path.open("ab") as more:
        more.write(bytes(100))
    assert "the last tensor ends at byte" in str(file.misfiled)


def test_what_is_said_of_the_model(quantized: Models, tmp_path: Path) -> None:
    header = written(quantized("llama", "W4A16g32"), tmp_path / "m.gguf").header
    theirs = GGUFReader(header.path)
    assert {key: value for key, value in header.metadata.items() if not isinstance(value, Listed)} == {
        name: field.contents()
        for name, field in theirs.fields.items()
        if not name.startswith("GGUF.") and not isinstance(field.contents(), list)
    }
    tokens = header.metadata["tokenizer.ggml.tokens"]
    assert tokens.count == 512
    assert read_list(header, "tokenizer.ggml.tokens") == theirs.fields["tokenizer.ggml.tokens"].contents()
    assert read_list(header, "tokenizer.ggml.token_type") == theirs.fields["tokenizer.ggml.token_type"].contents()
    assert [(t.name, t.start, t.nbytes) for t in read_header(header.path).tensors.values()] == [
        (t.name, t.data_offset, t.n_bytes) for t in theirs.tensors
    ]
    other = dict(QuantizedFolder.open(quantized("llama", "W4A16g32")).config)
    other |= {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "num_key_value_heads": 4}
    said = opened(header.path).unlike(other)
    assert len(said) == 2 and any("rope.freq_base" in one for one in said)


@pytest.mark.parametrize(
    ("key", "old", "new"), [("head_count_kv", 2, 1), ("head_count_kv", 2, 4), ("key_length", 16, 15)]
)
def test_heads_that_do_not_make_up_the_rows(key: str, old: int, new: int, quantized: Models, tmp_path: Path) -> None:
    """``verify`` says so, beside the folder that the file was made of."""
    file = written(folder := quantized("llama", "W4A16g32"), tmp_path / "m.gguf")
    raw, begin = file.path.read_bytes(), f"llama.attention.{key}".encode() + b"\x04\x00\x00\x00"
    assert raw.count(begin + bytes([old])) == 1
    file.path.write_bytes(raw.replace(begin + bytes([old]), begin + bytes([new])))
    found = {check.name: check for check in bitwright.verify(file.path, folder).checks}
    assert not found["complete"].passed and ", 64], the architecture's [" in found["complete"].found
    assert found["settings"].found == f"llama.attention.{key} is {new}, the folder's {old}"
    assert not found["settings"].passed and not found["weights"].passed
