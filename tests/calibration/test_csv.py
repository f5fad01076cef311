"""Rows of .csv files."""

from pathlib import Path

import pytest

from bitwright.calibration.texts import read_documents
from bitwright.core.errors import CalibrationError


def read(folder: Path, content: str, field: str | None = None) -> list[object]:
    (folder / "a.csv").write_text(content, encoding="utf-8")
    return list(read_documents(str(folder / "a.csv"), field=field))


def test_the_column_text(tmp_path: Path) -> None:
    assert read(tmp_path, 'id,text\n1,one\n2,"two, ""quoted""\nand a line"\n3,\n') == [
        "one",
        'two, "quoted"\nand a line',
    ]


def test_another_column(tmp_path: Path) -> None:
    assert read(tmp_path, "id,body\n1,one\n", "body") == ["one"]


def test_long_cells(tmp_path: Path) -> None:
    assert read(tmp_path, f"text\n{'x' * 200_000}\n") == ["x" * 200_000]


@pytest.mark.parametrize(
    ("content", "field", "says"),
    [
        ("id,body\n1,x\n", None, "found: the fields are id, body; name one with --text-field"),
        ("id,body\n1,x\n", "txt", "has no field 'txt' (--text-field); found: the fields are id, body"),
        ("text,id\na,1,b\n", None, "a.csv, line 2 has 3 cells, and line 1 names 2 columns; put a cell that has commas"),
        ('text\n"torn', None, "a.csv, line 2 cannot be read as CSV"),
        ("", None, "no text in the field 'text'"),
    ],
)
def test_refusals(content: str, field: str | None, says: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError) as error:
        read(tmp_path, content, field)
    assert says in str(error.value)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_field_that_is_not_there(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text('{"body": "x", "id": 1}\n')
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table({"body": ["x"], "id": [1]}), path)
    assert read_documents(str(path), field="body") == ["x"]
    with pytest.raises(CalibrationError) as error:
        read_documents(str(path), field="txt")
    assert "'txt' (--text-field); " in str(error.value) and "body, id" in str(error.value)
