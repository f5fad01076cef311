import json
import os
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitwright.calibration import rows, tables, texts
from bitwright.calibration.texts import read_text
from bitwright.core.errors import CalibrationError


def json_lines(*records: Any) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_parquet(path: Path, **columns: Any) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), path)
    return path


def refusal(source: Path | str) -> str:
    with pytest.raises(CalibrationError) as error:
        read_text(str(source))
    return str(error.value)


NEITHER = "a.jsonl, line 2 has no text in the field 'text', and no chat in messages or conversations; found: "


@pytest.mark.parametrize("name", ["a.txt", "a.md", "noextension"])
def test_a_text_file_is_its_text(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("Grüße,\n\n  zwei Zeilen.\n", encoding="utf-8")
    assert read_text(str(tmp_path / name)) == "Grüße,\n\n  zwei Zeilen.\n"


def test_json_lines_are_their_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    records = [{"text": "one\ntwo", "id": 1}, {"id": 2, "text": "Grüße \u2028 still one line"}, {"text": ""}]
    path.write_text(json_lines(*records) + "\n  \n" + json_lines({"text": "end"}), encoding="utf-8")
    assert read_text(str(path)) == "one\ntwo\n\nGrüße \u2028 still one line\n\n\n\nend"


def test_json_lines_of_windows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\r\n{"text": "two"}\r\n')
    assert read_text(str(tmp_path / "a.jsonl")) == "one\n\ntwo"


def test_parquet_is_its_text_column(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", id=[1, 2, 3], text=["one", None, "zwei\nGrüße"])
    assert read_text(str(path)) == "one\n\nzwei\nGrüße"


def test_a_folder_is_all_its_texts_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.txt").write_text("third")
    (tmp_path / "a.jsonl").write_text(json_lines({"text": "first"}, {"text": "second"}))
    write_parquet(tmp_path / "c.parquet", text=["fourth"])
    (tmp_path / "README.md").write_text("not this")
    (tmp_path / "d.txt").mkdir()
    assert read_text(str(tmp_path)) == "first\n\nsecond\n\nthird\n\nfourth"


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_whatever_stands_in_json_comes_back(documents: list[str]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_text(json_lines(*({"text": each} for each in documents)), encoding="utf-8")
        assert read_text(str(path)) == "\n\n".join(documents)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{text: 1}", "a.jsonl, line 2 is not JSON"),
        ('{"text": "torn', "a.jsonl, line 2 is not JSON"),
        ("[" * 100_000, "a.jsonl, line 2 is not JSON"),
        ('{"body": "x", "id": 3}', NEITHER + "the fields are body, id; name one with --text-field"),
        ('{"text": 3}', "a.jsonl, line 2 has no text in the field 'text'; found: 'text' is of type int"),
        ('"only text"', NEITHER + "str"),
        ("[1]", NEITHER + "list"),
    ],
)
def test_a_bad_line_is_named(line: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "good"}}\n{line}\n')
    assert says in refusal(path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_other_encodings_are_refused_with_the_place(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes('{"text": "Grüße"}'.encode("latin-1"))
    message = refusal(tmp_path / name)
    assert "is not UTF-8 text" in message and "at byte 12" in message and "iconv" in message


def test_a_parquet_without_text_says_what_it_has(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", body=["x"], id=[1])
    message = refusal(path)
    assert "has no column 'text', and none with chats (messages or conversations); it has body, id; name" in message


def test_what_is_no_parquet_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but not really")
    assert "a.parquet cannot be read as Parquet" in refusal(tmp_path / "a.parquet")


@pytest.mark.parametrize("column", [[1, 2], [["a"], ["b"]], [b"a\xff", b"b"]], ids=["int", "list", "bytes"])
def test_a_parquet_column_of_another_type_is_refused(column: list[Any], tmp_path: Path) -> None:
    message = refusal(write_parquet(tmp_path / "a.parquet", text=column))
    assert f"row 1 has no text in the field 'text'; found: 'text' is of type {type(column[0]).__name__}" in message


def test_half_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud800"}\n')
    assert "a.jsonl, line 1 has half of a surrogate pair in its text" in refusal(tmp_path / "a.jsonl")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("x")
    assert "holds no text: no .txt, .jsonl, .parquet, .csv file was found in it" in refusal(tmp_path)


@pytest.mark.parametrize("source", ["missing.txt", "a/b/missing.jsonl", "./missing", "../missing", "/missing/folder"])
def test_a_file_that_is_missing_is_no_dataset(source: str) -> None:
    assert f"there is no text file or folder {Path(source)}; name one, 'builtin', or a dataset" in refusal(source)


def test_a_text_instead_of_a_name(tmp_path: Path) -> None:
    assert "write it to a file" in refusal("All work and no play makes Jack a dull boy. " * 200)


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """A library ``datasets`` that knows one dataset, and is offline for all others; it notes what is asked."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, split: str) -> list[dict[str, str]]:
        asked.append((name, config, split))
        if name != "org/known":
            raise ConnectionError(f"Couldn't reach {name!r} on the Hub\nand more lines")
        return [{"text": "one"}, {"text": "two"}]

    module = ModuleType("datasets")
    module.__spec__ = ModuleSpec("datasets", None)
    vars(module)["load_dataset"] = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    yield asked


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("org/known", ("org/known", None, "train")),
        ("org/known:raw-v1", ("org/known", "raw-v1", "train")),
        ("org/known:raw-v1:test", ("org/known", "raw-v1", "test")),
        ("org/known::validation", ("org/known", None, "validation")),
    ],
)
def test_a_dataset_by_name(source: str, asked: tuple[Any, ...], datasets: list[tuple[Any, ...]]) -> None:
    assert read_text(source) == "one\n\ntwo"
    assert datasets == [asked]


def test_a_dataset_without_network_says_how_to_use_a_file(datasets: list[tuple[Any, ...]]) -> None:
    message = refusal("wikitext:wikitext-2-raw-v1")
    assert "'wikitext:wikitext-2-raw-v1' is no local file or folder" in message
    assert "(ConnectionError: Couldn't reach 'wikitext' on the Hub)" in message
    assert "name a local .txt, .jsonl, .csv or .parquet file instead, or 'builtin'" in message


@pytest.mark.parametrize(("source", "package"), [("org/known", "datasets"), ("a.parquet", "pyarrow")])
def test_a_missing_library_names_the_extra(
    source: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for module in (texts, tables):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    message = refusal(source)
    assert f"needs {'the datasets library' if package == 'datasets' else package}" in message
    assert "pip install 'bitwright[data]'" in message and ".txt" in message


class TestBounds:
    """Texts that would fill the memory, or block."""

    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
    def test_terabytes(self, name: str, tmp_path: Path) -> None:
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 2**40)
        assert "more than the 33,554,432 bytes of text that are read" in refusal(tmp_path / name)

    def test_a_line_of_megabytes(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").touch()
        os.truncate(tmp_path / "a.jsonl", 2**24 + 1)
        assert "line 1 has 16,777,217 bytes, and a line is one document" in refusal(tmp_path / "a.jsonl")

    def test_a_line_of_millions_of_values(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "a", "more": [' + "[]," * 2_000_000 + "[]]}")
        assert "a.jsonl, line 1: the JSON has about 4,000,004 values" in refusal(tmp_path / "a.jsonl")

    @pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
    def test_files_that_are_short_alone(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rows, "MOST_BYTES", 500)
        for n in range(10):
            path = tmp_path / f"{n}{name}"
            if name == "a.jsonl":
                path.write_text(json_lines({"text": "x" * 100}))
            else:
                write_parquet(path, text=["x" * 100])
        assert "has more than the 500 bytes of text that are read" in refusal(tmp_path)

    def test_many_rows(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rows, "MOST_ROWS", 3)
        assert "has 4 rows, and 3 are read" in refusal(write_parquet(tmp_path / "a.parquet", text=["a"] * 4))
        (tmp_path / "a.jsonl").write_text(json_lines(*[{"text": "a"}] * 4))
        assert "has more than 3 rows" in refusal(tmp_path / "a.jsonl")

    def test_two_columns_of_one_name(self, tmp_path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        assert "has several columns 'text'" in refusal(tmp_path / "a.parquet")

    def test_many_lines_with_nothing_in_them(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rows, "MOST_ROWS", 3)
        (tmp_path / "a.jsonl").write_text('{"text": "a"}' + "\n" * 4)
        assert "has more than 3 rows" in refusal(tmp_path / "a.jsonl")

    def test_a_parquet_bomb(self, tmp_path: Path) -> None:
        """A long value, once in the dictionary, and again and again in the rows: 16 GB in a few kB."""
        pyarrow = pytest.importorskip("pyarrow")
        rows = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 16_000, pyarrow.int32()), ["x" * 10**6])
        path = write_parquet(tmp_path / "a.parquet", text=rows)
        assert path.stat().st_size < 10**6
        assert "has more than the 33,554,432 bytes of text that are read" in refusal(path)

    def test_a_parquet_of_megabytes_in_one_page(self, tmp_path: Path) -> None:
        path = write_parquet(tmp_path / "a.parquet", text=["x" * (70 << 20)])
        assert "more than the 33,554,432 bytes of text that are read" in refusal(path)

    def test_invalid_utf8_in_parquet(self, tmp_path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        broken = pyarrow.array([b"good", b"\xff\xfe"]).view(pyarrow.string())
        assert "is not UTF-8 text: invalid start byte" in refusal(write_parquet(tmp_path / "a.parquet", text=broken))

    def test_compressed_text(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl.gz").write_bytes(b"\x1f\x8b")
        assert "compressed files are not read; unpack it: gunzip a.jsonl.gz" in refusal(tmp_path / "a.jsonl.gz")

    def test_pipes_and_devices(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "a.txt")
        for path in (tmp_path / "a.txt", Path("/dev/zero")):
            assert f"{path} is no file, but a named pipe or a device" in refusal(path)
        assert "holds no text" in refusal(tmp_path)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
class TestRowsWithoutText:
    def write(self, kind: str, path: Path, values: list[str | None]) -> Path:
        if kind == "parquet":
            return write_parquet(path / "a.parquet", text=values)
        (path / "a.jsonl").write_text(json_lines(*({"text": value} for value in values)))
        return path / "a.jsonl"

    def test_they_are_left_out_and_counted(self, kind: str, tmp_path: Path) -> None:
        path, notes = self.write(kind, tmp_path, ["one", None, "two", None]), list[str]()
        assert read_text(str(path), notes.append) == "one\n\ntwo"
        assert notes == [f"2 of 4 rows of '{path}' have no text ('text' is null), and are left out"]

    def test_nothing_is_said_of_whole_texts(self, kind: str, tmp_path: Path) -> None:
        notes = list[str]()
        read_text(str(self.write(kind, tmp_path, ["one"])), notes.append)
        assert notes == []

    def test_nothing_is_left(self, kind: str, tmp_path: Path) -> None:
        assert "holds no text: 'text' is null in all of its 2 rows" in refusal(self.write(kind, tmp_path, [None, None]))
