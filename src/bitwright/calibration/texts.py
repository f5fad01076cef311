"""The source of calibration and evaluation data: a file, a folder, or a dataset of the Hugging Face hub."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bitwright.core.errors import CalibrationError, CheckpointError
from bitwright.core.small_files import MIB, read_small, refuse_too_many, uncollected
from bitwright.demo import texts

BUILTIN = "builtin"
SUFFIXES = (".txt", ".jsonl", ".parquet")
TEXT_FIELD = "text"
BETWEEN_DOCUMENTS = "\n\n"
MOST_BYTES, MOST_LINE, MOST_ROWS = 32 * MIB, 16 * MIB, 1_500_000
"""The most bytes of text (a file, a folder, or all documents of a dataset), bytes of a line of JSON, and rows.

All of the text is tokenized, whatever number of samples or windows is taken from it.
"""
ROWS_AT_ONCE = 256
"""The rows of a Parquet file that are in memory at once; values of a dictionary are not repeated."""
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell one, UTF-8 and tokenizers cannot


def text_of(source: str, purpose: str, say: Callable[[str], None] = lambda note: None) -> str:
    """Read the text that ``--calibration`` or ``--text`` names; ``builtin`` is the embedded model's text.

    ``purpose`` is "calibration" or "evaluation". ``say`` is called with what a user should know of the text. Raises
    CalibrationError.
    """
    if not source:
        raise CalibrationError(f"an empty name was given for the {purpose} text; name a file or a folder, or 'builtin'")
    if source == BUILTIN:
        return texts.calibration_text() if purpose == "calibration" else texts.evaluation_text()
    if get_close_matches(source, [BUILTIN], cutoff=0.75) and not Path(source).exists():
        raise CalibrationError(f"there is no {purpose} text '{source}'; did you mean {BUILTIN}?")
    text = read_text(source, say)
    if not text.strip():
        raise CalibrationError(f"'{source}' holds no text: it is empty")
    return text


def read_text(source: str, say: Callable[[str], None] = lambda note: None) -> str:
    """Read a .txt, .jsonl or .parquet file, a folder of them, or a dataset ``name[:config[:split]]``.

    Documents of .jsonl, .parquet and datasets are their field ``text``; documents are joined by an empty line. Rows
    whose text is null are left out, and ``say`` is told their number. Raises CalibrationError, also for more text than
    ``MOST_BYTES``.
    """
    path, rows = Path(source), _Rows(source)
    try:
        path.exists()
    except OSError as error:  # the name is too long; perhaps it is a text
        raise CalibrationError(f"'{source[:60]}...' cannot be read: {error.strerror}; write it to a file") from None
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not files:
            raise CalibrationError(f"folder {path} holds no text: no {', '.join(SUFFIXES)} file was found in it")
        documents: Iterator[str] = (document for file in files for document in _read_file(file, rows))
    elif path.is_file():
        documents = _read_file(path, rows)
    elif path.suffix in SUFFIXES or path.is_absolute() or source.startswith(".") or path.exists():
        why = "is no file, but a named pipe or a device" if path.exists() else "there is no text file or folder"
        obstacle = f"{path} {why}" if path.exists() else f"{why} {path}"
        raise CalibrationError(f"{obstacle}; name one, 'builtin', or a dataset of the hub")
    else:
        documents = _dataset(source, rows)
    text = BETWEEN_DOCUMENTS.join(rows.within_bounds(documents))
    rows.report(say)
    return text


class _Rows:
    """The rows of a text: those without text are counted, and their number and bytes are bounded."""

    def __init__(self, source: str) -> None:
        self.source, self.read, self.empty, self.nbytes = source, 0, 0, 0

    def document(self, record: object, where: str) -> Iterator[str]:
        """Yield the text of a row; nothing if it is null."""
        self.read += 1
        if self.read > MOST_ROWS:
            raise self.too_many()
        if isinstance(record, dict) and TEXT_FIELD in record and record[TEXT_FIELD] is None:
            self.empty += 1
        else:
            yield _text_of(record, where)

    def within_bounds(self, documents: Iterable[str]) -> Iterator[str]:
        """Yield the documents. Raises CalibrationError once they are too long together."""
        for document in documents:
            self.nbytes += len(document)
            if self.nbytes > MOST_BYTES:
                raise self.too_long("more")
            yield document

    def too_long(self, nbytes: str) -> CalibrationError:
        """The error for a text that is too long."""
        return CalibrationError(
            f"'{self.source}' has {nbytes} than the {MOST_BYTES:,} bytes of text that are read; all of a text is "
            f"tokenized, so take a part of it: head -c {MOST_BYTES // 2} of a .txt, head -n of a .jsonl, or fewer files"
        )

    def too_many(self) -> CalibrationError:
        """The error for more rows than are read."""
        return CalibrationError(f"'{self.source}' has more than {MOST_ROWS:,} rows; take a part of them")

    def report(self, say: Callable[[str], None]) -> None:
        """Say how many rows have no text. Raises CalibrationError if none has."""
        if self.empty and self.empty == self.read:
            raise CalibrationError(
                f"'{self.source}' holds no text: '{TEXT_FIELD}' is null in all of its {self.read:,} rows"
            )
        if self.empty:
            say(
                f"{self.empty:,} of {self.read:,} rows of '{self.source}' have no text ('{TEXT_FIELD}' is null), "
                "and are left out"
            )


def _read_file(path: Path, rows: _Rows) -> Iterator[str]:
    if path.suffix.lower() == ".json":
        raise CalibrationError(
            f"{path}: .json is not read; write one object per line, with a field '{TEXT_FIELD}', as .jsonl"
        )
    if path.suffix.lower() == ".gz":
        raise CalibrationError(f"{path}: compressed files are not read; unpack it: gunzip {path.name}")
    if path.suffix.lower() == ".parquet":
        return _parquet(path, rows)
    if (size := path.stat().st_size) > MOST_BYTES:
        raise rows.too_long(f"{size:,} bytes, more")
    raw = read_small(path, MOST_BYTES, CalibrationError)
    if b"\r" in raw:  # lines of Windows, and of an old Mac
        raw = raw.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    try:
        if path.suffix.lower() == ".jsonl":
            return _json_lines(path, raw, rows)
        return iter([raw.decode("utf-8-sig")])
    except UnicodeDecodeError as error:
        raise _no_utf8(path, error, 0) from None


def _no_utf8(path: Path, error: UnicodeDecodeError, before: int) -> CalibrationError:
    return CalibrationError(
        f"{path} is not UTF-8 text: {error.reason} at byte {before + error.start}; convert it, for example with "
        f"iconv -f ISO-8859-1 -t UTF-8"
    )


def _json_lines(path: Path, raw: bytes, rows: _Rows) -> Iterator[str]:
    if raw.count(b"\n") > MOST_ROWS:  # empty lines too: each takes time
        raise rows.too_many()
    start, number = 3 if raw.startswith(b"\xef\xbb\xbf") else 0, 0
    while start < len(raw):
        stop = raw.find(b"\n", start)
        stop, number = len(raw) if stop < 0 else stop, number + 1
        if stop - start > MOST_LINE:
            raise CalibrationError(
                f"{path}, line {number} has {stop - start:,} bytes, and a line is one document of at most "
                f"{MOST_LINE:,}; divide it into several"
            )
        line = raw[start:stop]
        if line.strip():
            yield from rows.document(_record(path, number, line, start), f"{path}, line {number}")
        start = stop + 1


def _record(path: Path, number: int, line: bytes, start: int) -> object:
    """Parse a line of JSON."""
    where = f"{path}, line {number}"
    try:
        refuse_too_many(line, where)
        with uncollected():
            return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _no_utf8(path, error, start) from None
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{where} is not JSON: {error}; mend or remove the line") from None
    except CheckpointError as error:
        raise CalibrationError(str(error)) from None


def _text_of(record: object, where: str) -> str:
    if isinstance(record, dict) and isinstance(text := record.get(TEXT_FIELD), str):
        if _LONE_SURROGATE.search(text):
            raise CalibrationError(f"{where} has half of a surrogate pair in its text, which is no character; mend it")
        return str(text)
    if isinstance(record, dict) and TEXT_FIELD in record:
        content = f"'{TEXT_FIELD}' is of type {type(record[TEXT_FIELD]).__name__}"
    elif isinstance(record, dict):
        names = ", ".join(str(name)[:40] for name in list(record)[:20])
        content = f"the fields are {names}{', ...' if len(record) > 20 else ''}"
    else:
        content = type(record).__name__
    raise CalibrationError(f"{where} has no text in the field '{TEXT_FIELD}'; found: {content}")


def _parquet(path: Path, rows: _Rows) -> Iterator[str]:
    if find_spec("pyarrow") is None:
        raise CalibrationError(f"reading {path} needs pyarrow: pip install 'bitwright[data]', or use a .txt file")
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        schema = pyarrow.parquet.read_schema(path)
        if TEXT_FIELD not in schema.names:
            raise CalibrationError(f"{path} has no column '{TEXT_FIELD}'; it has {', '.join(schema.names[:20])}")
        if schema.names.count(TEXT_FIELD) > 1:
            raise CalibrationError(f"{path} has several columns '{TEXT_FIELD}'; rename all but one")
        kind = schema.field(TEXT_FIELD).type
        if pyarrow.types.is_nested(kind):  # refused before a list is read, which may be of any length
            _text_of({TEXT_FIELD: {} if pyarrow.types.is_struct(kind) else []}, f"{path}, row 1")
        words = [TEXT_FIELD] if str(kind) in ("string", "large_string", "binary", "large_binary") else []
        with pyarrow.parquet.ParquetFile(path, read_dictionary=words) as file:
            _refuse_large(file.metadata, rows)
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=[TEXT_FIELD], use_threads=False):
                for value in _values(batch.column(0), rows):
                    number += 1
                    yield from rows.document({TEXT_FIELD: value}, f"{path}, row {number}")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path}, row {number + 1} or one of the {ROWS_AT_ONCE} after it is not UTF-8 text: {error.reason}; write "
            "the file again as UTF-8"
        ) from None
    except (pyarrow.ArrowException, OSError, MemoryError) as error:
        raise CalibrationError(f"{path} cannot be read as Parquet: {str(error)[:500]}") from None


def _refuse_large(metadata: Any, rows: _Rows) -> None:
    """Raise CalibrationError for a Parquet file that says it has more rows or bytes of text than are read."""
    if metadata.num_rows > MOST_ROWS:
        raise CalibrationError(
            f"'{rows.source}' has {metadata.num_rows:,} rows, and {MOST_ROWS:,} are read; take a part of them"
        )
    columns = [
        column
        for group in map(metadata.row_group, range(metadata.num_row_groups))
        for column in map(group.column, range(group.num_columns))
        if column.path_in_schema.split(".")[0] == TEXT_FIELD
    ]
    nbytes = sum(column.total_uncompressed_size for column in columns)
    if nbytes > MOST_BYTES:
        raise rows.too_long(f"{nbytes:,} bytes, more")


def _values(column: Any, rows: _Rows) -> list[Any]:
    """The values of some rows of a Parquet file, after a look at how long they are together."""
    import pyarrow.compute

    if not pyarrow.types.is_dictionary(column.type):
        return list(column.to_pylist())
    indices, words = column.indices, column.dictionary
    lengths = pyarrow.compute.take(pyarrow.compute.binary_length(words), indices)
    if (pyarrow.compute.sum(lengths).as_py() or 0) > MOST_BYTES:
        raise rows.too_long("more")
    return list(pyarrow.compute.take(words, indices).to_pylist())


def _dataset(source: str, rows: _Rows) -> Iterator[str]:
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    use_a_file = "name a local .txt, .jsonl or .parquet file instead, or 'builtin'"
    if find_spec("datasets") is None:
        raise CalibrationError(
            f"'{source}' is no local file or folder, and reading a dataset of that name needs the datasets library: "
            f"pip install 'bitwright[data]', or {use_a_file}"
        )
    import datasets

    try:
        records = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # the library raises many kinds: offline, unknown name, gated, broken
        raise CalibrationError(
            f"'{source}' is no local file or folder, and the dataset of that name could not be loaded "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}); {use_a_file}"
        ) from None
    return (text for record in records for text in rows.document(dict(record), f"dataset {source}"))
