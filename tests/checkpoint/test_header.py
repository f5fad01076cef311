import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file

from bitwright.checkpoint.header import DTYPES, TensorEntry, build_header, file_order, read_header
from bitwright.checkpoint.reader import Checkpoint
from bitwright.checkpoint.writer import write_tensors
from bitwright.core.errors import CheckpointError

quick = settings(
    max_examples=100, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
F32_4 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


def file_of(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def refusal(path: Path, raw: bytes) -> str:
    path.write_bytes(raw)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000
    return str(caught.value)


def claim(**changes: Any) -> dict[str, Any]:
    return {"q": F32_4 | changes}


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "it has 0 bytes"),
    "seven bytes": (b"1234567", "it has 7 bytes"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    "huge length": (file_of({}, length=2**64 - 1), "18446744073709551615"),
    "length beyond end": (file_of({}, length=99), "a header of 99 bytes is promised, the file has 10"),
    "no json": (file_of(b"{nonsense"), "not JSON"),
    "no utf-8": (file_of(b'{"\xff": 1}'), "not JSON"),
    "an array": (file_of(b"[1]"), "not with '{'"),
    "nothing": (file_of(b""), "begins with b''"),
    "leading space": (file_of(b" {}"), "begins with"),
    "too deep": (file_of(b'{"a":' * 10**5), "nested too deeply"),
    "huge integer": (file_of(b'{"a":' + b"9" * 5000 + b"}"), "not JSON"),
    "duplicate tensor": (file_of(b'{"a":1,"a":2}'), "'a' appears twice"),
    "duplicate key": (file_of(b'{"a":{"dtype":1,"dtype":2}}'), "'dtype' appears twice"),
    "metadata no dict": (file_of({"__metadata__": []}), "must map text to text"),
    "metadata no text": (file_of({"__metadata__": {"a": 1}}), "must map text to text"),
    "no dict": (file_of({"q": 3}), "expected exactly data_offsets, dtype, shape"),
    "missing key": (file_of({"q": {"dtype": "F32", "shape": []}}), "expected exactly"),
    "unknown key": (file_of(claim(more=1), bytes(16)), "expected exactly"),
    "unknown dtype": (file_of(claim(dtype="F33"), bytes(16)), "unknown dtype 'F33'. Known: BF16"),
    "dtype a list": (file_of(claim(dtype=[]), bytes(16)), "unknown dtype []"),
    "shape a number": (file_of(claim(shape=4), bytes(16)), "list of integers"),
    "shape bool": (file_of(claim(shape=[4, True]), bytes(16)), "list of integers"),
    "shape float": (file_of(claim(shape=[4.0]), bytes(16)), "list of integers"),
    "shape negative": (file_of(claim(shape=[-4]), bytes(16)), "list of integers"),
    "shape overflow": (file_of(claim(shape=[2**32, 2**32]), bytes(16)), "63 bits"),
    "shape overflow with zero": (file_of(claim(shape=[2**62, 0, 4], data_offsets=[0, 0])), "63 bits"),
    "shape enormous": (file_of(claim(shape=[10**4000] * 60), bytes(16)), "63 bits"),
    "rank": (file_of(claim(shape=[1] * 65), bytes(16)), "65 dimensions"),
    "one offset": (file_of(claim(data_offsets=[16]), bytes(16)), "two integers"),
    "offsets text": (file_of(claim(data_offsets=["0", "16"]), bytes(16)), "two integers"),
    "offsets negative": (file_of(claim(data_offsets=[-16, 0]), bytes(16)), "two integers"),
    "offsets reversed": (file_of(claim(data_offsets=[16, 0]), bytes(16)), "reversed"),
    "offsets enormous": (file_of(claim(data_offsets=[10**4299, 10**4299 + 16]), bytes(16)), "truncated"),
    "size": (file_of(claim(shape=[5]), bytes(16)), "F32 of shape [5] takes 20 bytes, but its offsets [0, 16] hold 16"),
    "hole before": (file_of(claim(data_offsets=[8, 24]), bytes(24)), "leaves a hole before it"),
    "overlap": (file_of({"p": F32_4, "q": F32_4 | {"data_offsets": [8, 24]}}, bytes(24)), "overlaps"),
    "same place": (file_of({"p": F32_4, "q": F32_4}, bytes(16)), "overlaps"),
    "trailing": (file_of(claim(), bytes(17)), "1 bytes follow the last tensor"),
    "trailing without tensors": (file_of({}, b"x"), "1 bytes follow"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused_with_the_reason(tmp_path: Path, case: str) -> None:
    raw, reason = HOSTILE[case]
    assert reason in refusal(tmp_path / "x.safetensors", raw)


def test_truncated_data_is_told_in_bytes(tmp_path: Path) -> None:
    raw = file_of(claim(), bytes(12))
    message = refusal(tmp_path / "x.safetensors", raw)
    assert f"truncated: the header promises {len(raw) + 4} bytes, the file has {len(raw)}" in message
    assert "'q'" in message


def test_names_cannot_play_with_the_terminal(tmp_path: Path) -> None:
    name = "\x1b[2J\udcff" + "x" * 5000
    message = refusal(tmp_path / "x.safetensors", file_of({name: 1}))
    message.encode("utf-8")
    assert "\x1b" not in message


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(CheckpointError, match="not a regular file"):
            read_header(path)
    for path in (tmp_path / "absent", tmp_path / "nul\0", tmp_path / ("x" * 5000)):
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_header(path)


def test_a_valid_header_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"b": torch.ones(2, 3), "a": torch.ones(4, dtype=torch.int8)}, path, metadata={"format": "pt"})
    header = read_header(path)
    start = header.data_start
    assert header.metadata == {"format": "pt"}
    assert header.entries == {
        "b": TensorEntry("b", torch.float32, (2, 3), start, start + 24),
        "a": TensorEntry("a", torch.int8, (4,), start + 24, start + 28),
    }
    assert (header.entries["b"].elements, header.entries["b"].nbytes) == (6, 24)
    assert header.size == path.stat().st_size == start + 28


def test_built_bytes_are_the_librarys(tmp_path: Path) -> None:
    tensors = {f"t.{name}.é": torch.zeros(3, 8, dtype=torch.uint8).view(dtype) for name, dtype in DTYPES.items()}
    write_tensors(tmp_path / "x", tensors, {"format": "pt"})
    assert (tmp_path / "x").read_bytes() == save(tensors, metadata={"format": "pt"})
    entries = [TensorEntry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    assert build_header(entries) == build_header(entries[::-1])
    assert len(build_header(entries)) % 8 == 0
    with pytest.raises(TypeError, match=r"x: safetensors files hold no torch.complex128"):
        build_header([TensorEntry("x", torch.complex128, ())])


@quick
@given(st.binary(max_size=200))
def test_random_bytes_never_escape(tmp_path: Path, raw: bytes) -> None:
    for content in (raw, file_of(b"{" + raw)):
        (tmp_path / "x").write_bytes(content)
        _reads_as_the_library_or_is_refused(tmp_path / "x")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(sorted(DTYPES)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@quick
@given(st.data())
def test_mutated_claims_never_escape(tmp_path: Path, data: st.DataObject) -> None:
    """A claim exchanged for any JSON value: refused, or something the safetensors library reads just the same."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}, "p": dict(F32_4), "q": dict(F32_4)}
    header["q"]["data_offsets"] = [16, 32]
    key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "p", "__metadata__"]))
    place = header if key in header else header["p"]
    place[key] = data.draw(json_values | st.lists(st.integers(-1, 40), max_size=3))
    (tmp_path / "x").write_bytes(file_of(header, bytes(32)))
    _reads_as_the_library_or_is_refused(tmp_path / "x")


@quick
@given(st.data())
def test_mutated_files_never_escape(tmp_path: Path, data: st.DataObject) -> None:
    """Bytes exchanged, cut out or put in anywhere."""
    raw = bytearray(file_of({"p": F32_4, "q": F32_4 | {"data_offsets": [16, 32]}}, bytes(32)))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw)))
        raw[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    (tmp_path / "x").write_bytes(raw)
    _reads_as_the_library_or_is_refused(tmp_path / "x")


shapes = st.lists(st.integers(0, 4), max_size=4)
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=10).filter(lambda name: name != "__metadata__")


@quick
@given(st.dictionaries(names, st.tuples(st.sampled_from(sorted(DTYPES)), shapes), max_size=5))
def test_valid_files_round_trip(tmp_path: Path, claims: dict[str, tuple[str, list[int]]]) -> None:
    """Whatever the library writes is read, bit for bit; whatever is written here, the library reads."""
    (tmp_path / "config.json").write_text("{}")
    tensors = {
        name: torch.randint(0, 2, (*shape, DTYPES[dtype].itemsize), dtype=torch.uint8)
        .view(DTYPES[dtype])[..., 0]
        .clone()
        for name, (dtype, shape) in claims.items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    found = Checkpoint.open(tmp_path)
    assert found.names == tuple(sorted(tensors))
    assert all(_same(found.read(name), tensor) for name, tensor in tensors.items())
    write_tensors(tmp_path / "again", tensors)
    again = load_file(tmp_path / "again")
    assert again.keys() == tensors.keys()
    assert all(_same(again[name], tensor) for name, tensor in tensors.items())
    ordered = file_order(read_header(tmp_path / "again").entries.values())
    assert [entry.start for entry in ordered] == sorted(entry.start for entry in ordered)


def _reads_as_the_library_or_is_refused(path: Path) -> None:
    try:
        header = read_header(path)
    except CheckpointError:
        return
    try:
        with safe_open(path, framework="pt") as file:
            assert {name: file.get_slice(name).get_shape() for name in file.keys()} == {  # noqa: SIM118
                name: list(entry.shape) for name, entry in header.entries.items()
            }
    except SafetensorError as error:
        raise AssertionError(f"accepted here, refused by safetensors: {error}") from error


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))
