"""Rows of .csv and .parquet files."""

import csv
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from io import StringIO
from itertools import chain
from pathlib import Path
from typing import Any

from bitwright.calibration import rows as bounds
from bitwright.calibration.rows import FIELDS, TEXT_FIELD, TOOLS_FIELD, Document, Rows
from bitwright.core.errors import CalibrationError

ROWS_AT_ONCE = 256
"""The rows of a Parquet file that are in memory at once; values of a dictionary are not repeated."""


def csv_rows(path: Path, text: str, rows: Rows) -> Iterator[Document]:
    """Yield the documents of a .csv file, whose first line names the columns; an empty cell is null."""
    longest = csv.field_size_limit(max(len(text), 1))
    reader = csv.reader(StringIO(text, newline=""), strict=True)
    try:
        columns = next(reader, [])
        if not any(field in columns for field in rows.fields):
            raise rows.absent(dict.fromkeys(columns), f"{path}, line 1 (the names of the columns)")
        for cells in reader:
            where = f"{path}, line {reader.line_num}"
            if len(cells) > len(columns):
                raise CalibrationError(
                    f"{where} has {len(cells)} cells, and line 1 names {len(columns)} columns; put a cell that has "
                    "commas in it into double quotes"
                )
            if cells:
                yield from rows.document(dict(zip(columns, (cell or None for cell in cells), strict=False)), where)
    except csv.Error as error:
        raise CalibrationError(f"{path}, line {reader.line_num} cannot be read as CSV: {error}") from None
    finally:
        csv.field_size_limit(longest)


def parquet_rows(path: Path, rows: Rows) -> Iterator[Document]:
    """Yield the documents of a Parquet file. Raises CalibrationError, also for values that would fill the memory."""
    if find_spec("pyarrow") is None:
        raise CalibrationError(f"reading {path} needs pyarrow: pip install 'bitwright[data]', or use a .txt file")
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        schema = pyarrow.parquet.read_schema(path)
        twice = next((name for name in rows.fields if schema.names.count(name) > 1), None)
        if twice is not None:
            raise CalibrationError(f"{path} has several columns '{twice}'; rename all but one")
        columns = _columns(path, schema, rows)
        with pyarrow.parquet.ParquetFile(path) as file:
            leaves = _leaves(file.metadata, columns)
            _refuse_large(file.metadata, leaves, rows)
        texts = [leaf.path_in_schema for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
        with pyarrow.parquet.ParquetFile(path, read_dictionary=sorted(set(texts))) as file:
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=columns, use_threads=False):
                if sum(map(_nbytes, batch.columns)) > bounds.MOST_BYTES:
                    raise rows.too_long("more")
                for record in _records(batch):
                    number += 1
                    yield from rows.document(record, f"{path}, row {number}")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path}, row {number + 1} or one of the {ROWS_AT_ONCE} after it is not UTF-8 text: {error.reason}; write "
            "the file again as UTF-8"
        ) from None
    except (pyarrow.ArrowException, OSError, MemoryError, RecursionError) as error:
        raise CalibrationError(f"{path} cannot be read as Parquet: {str(error)[:500]}") from None


def _columns(path: Path, schema: Any, rows: Rows) -> list[str]:
    """The columns that are read, refused by their types before a value is read."""
    import pyarrow.types as kinds

    columns = [field for field in rows.fields if field in schema.names]
    if not columns:
        names = ", ".join(schema.names[:20])
        if rows.field is not None:
            raise CalibrationError(f"{path} has no column '{rows.field}' (--text-field); it has {names}")
        raise CalibrationError(
            f"{path} has no column '{TEXT_FIELD}', and none with chats ({' or '.join(FIELDS[:-1])}); it has {names}; "
            "name one with --text-field"
        )
    chats = False
    for column in columns:
        kind = schema.field(column).type
        chat = _is_list(kind) and kinds.is_struct(kind.value_type)
        chats = chats or chat or column in FIELDS[:-1]
        if kinds.is_nested(kind) and not chat:  # refused before a list is read, which may be of any length
            name = "list" if _is_list(kind) else "dict"
            raise CalibrationError(
                f"{path}, row 1 has no text in the field '{column}'; found: '{column}' is of type {name}"
            )
    return [*columns, *([TOOLS_FIELD] if chats and TOOLS_FIELD in schema.names else [])]


def _is_list(kind: Any) -> bool:
    import pyarrow.types as kinds

    return bool(kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind))


def _leaves(metadata: Any, columns: list[str]) -> list[Any]:
    """The chunks of flat values of which the columns are made."""
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    chunks = chain.from_iterable(map(group.column, range(group.num_columns)) for group in groups)
    return [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns]


def _refuse_large(metadata: Any, leaves: list[Any], rows: Rows) -> None:
    """Raise CalibrationError for a Parquet file that says it has more rows, values or bytes of text than are read."""
    if metadata.num_rows > bounds.MOST_ROWS:
        raise CalibrationError(
            f"'{rows.source}' has {metadata.num_rows:,} rows, and {bounds.MOST_ROWS:,} are read; take a part of them"
        )
    values = sum(leaf.num_values for leaf in leaves)
    if values > bounds.MOST_ROWS * len(FIELDS):
        raise CalibrationError(f"'{rows.source}' has {values:,} values in its chats, more than are read; take a part")
    nbytes = sum(leaf.total_uncompressed_size for leaf in leaves)
    if nbytes > bounds.MOST_BYTES:
        raise rows.too_long(f"{nbytes:,} bytes, more")


def _nbytes(column: Any) -> int:
    """The bytes of the texts in a column, those of a dictionary as often as they are used."""
    import pyarrow.compute
    import pyarrow.types as kinds

    if kinds.is_dictionary(column.type):
        lengths = pyarrow.compute.take(pyarrow.compute.binary_length(column.dictionary), column.indices)
        return pyarrow.compute.sum(lengths).as_py() or 0
    if kinds.is_struct(column.type):
        return sum(_nbytes(column.field(index)) for index in range(column.type.num_fields))
    return _nbytes(column.flatten()) if _is_list(column.type) else int(column.nbytes)


def _records(batch: Any) -> Iterator[dict[str, Any]]:
    """The rows of a batch."""
    yield from map(without_null_keys, batch.to_pylist())


def without_null_keys(record: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose messages have no null keys: where all rows have the same columns, they stand for absent ones."""
    return {field: _without_null(value) if isinstance(value, list) else value for field, value in record.items()}


def _without_null(value: Any) -> Any:
    """A value without null keys, at any level; the content of a message may be null."""
    if isinstance(value, list):
        return [_without_null(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None or key == "content"}
    return value
