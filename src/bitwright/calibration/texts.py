"""The source of calibration and evaluation data: a file, a folder, or a dataset of the Hugging Face hub."""

import json
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

from bitwright.calibration import mix
from bitwright.calibration import rows as bounds
from bitwright.calibration.rows import MOST_BYTES, Document, Rows
from bitwright.calibration.tables import csv_rows, parquet_rows, without_null_keys
from bitwright.core.errors import CalibrationError, CheckpointError
from bitwright.core.small_files import MIB, read_small, refuse_too_many, uncollected
from bitwright.demo import texts

BUILTIN, MIX = "builtin", "mix"
SUFFIXES = (".txt", ".jsonl", ".parquet", ".csv")
BETWEEN_DOCUMENTS = "\n\n"
MOST_LINE = 16 * MIB
"""The most bytes of a line of JSON."""

Say = Callable[[str], None]


def _unheard(note: str) -> None:
    """Say nothing."""


def text_of(source: str, purpose: str, say: Say = _unheard, field: str | None = None) -> str:
    """Read the text that ``--text`` names, all documents joined by empty lines, as the papers do.

    ``purpose`` is "calibration" or "evaluation"; ``builtin`` is the embedded model's text. ``say`` is called with what
    a user should know of the text. Raises CalibrationError, also for chats, which only a chat template makes a text of.
    """
    return BETWEEN_DOCUMENTS.join(map(_plain, documents_of(source, purpose, say, field)))


def documents_of(source: str, purpose: str, say: Say = _unheard, field: str | None = None) -> list[Document]:
    """Read the documents of one source, such as the rows of a file; ``mix`` and ``builtin`` come with Bitwright.

    Raises CalibrationError.
    """
    if not source:
        raise CalibrationError(f"an empty name was given for the {purpose} text; name a file or a folder, or 'builtin'")
    if source == BUILTIN:
        return [texts.calibration_text() if purpose == "calibration" else texts.evaluation_text()]
    if is_mix(source):
        if purpose != "calibration":
            raise CalibrationError(f"'{MIX}' is calibration data, no text to measure on; name a file, or '{BUILTIN}'")
        return list(mix.documents())
    if (known := get_close_matches(source, [BUILTIN, MIX], cutoff=0.75)) and not Path(source).exists():
        raise CalibrationError(f"there is no {purpose} text '{source}'; did you mean {known[0]}?")
    documents = read_documents(source, say, field)
    if not any(not isinstance(document, str) or document.strip() for document in documents):
        raise CalibrationError(f"'{source}' holds no text: it is empty")
    return documents


def is_mix(source: str) -> bool:
    """Whether a name stands for the built-in mix; a file or folder of that name takes precedence."""
    return source == MIX and not Path(source).exists()


def read_text(source: str, say: Say = _unheard) -> str:
    """Read a file, a folder or a dataset as ``read_documents``, and join its documents by empty lines."""
    return BETWEEN_DOCUMENTS.join(map(_plain, read_documents(source, say)))


def read_documents(source: str, say: Say = _unheard, field: str | None = None) -> list[Document]:
    """Read a .txt, .jsonl, .csv or .parquet file, a folder of them, or a dataset ``name[:config[:split]]``.

    Documents are whole .txt files and the rows of all others: the chat in their field ``messages`` or
    ``conversations``, or the text in ``text``, or what stands in ``field``. Rows in which that is null are left out,
    and ``say`` is told their number. Raises CalibrationError, also for more text than ``MOST_BYTES``.
    """
    path, rows = Path(source), Rows(source, field)
    try:
        path.exists()
    except OSError as error:  # the name is too long; perhaps it is a text
        raise CalibrationError(f"'{source[:60]}...' cannot be read: {error.strerror}; write it to a file") from None
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not files:
            raise CalibrationError(f"folder {path} holds no text: no {', '.join(SUFFIXES)} file was found in it")
        documents: Iterable[Document] = (document for file in files for document in _read_file(file, rows))
    elif path.is_file():
        documents = _read_file(path, rows)
    elif path.suffix in SUFFIXES or path.is_absolute() or source.startswith(".") or path.exists():
        why = "is no file, but a named pipe or a device" if path.exists() else "there is no text file or folder"
        obstacle = f"{path} {why}" if path.exists() else f"{why} {path}"
        raise CalibrationError(f"{obstacle}; name one, 'builtin', or a dataset of the hub")
    else:
        documents = _dataset(source, rows)
    read = list(rows.within_bounds(documents))
    for note in rows.notes:
        say(note)
    return read


def _plain(document: Document) -> str:
    """A document that is a text. Raises CalibrationError for a chat."""
    if isinstance(document, str):
        return document
    raise CalibrationError(
        f"{document.where} is a chat (field '{document.field}'), and one stream of plain text was asked for "
        "(--protocol papers); leave that out, or name a field that holds text: --text-field NAME"
    )


def _read_file(path: Path, rows: Rows) -> Iterator[Document]:
    suffix = path.suffix.lower()
    if suffix == ".json":
        raise CalibrationError(
            f"{path}: .json is not read; write one object per line, with a field 'text' or 'messages', as .jsonl"
        )
    if suffix == ".gz":
        raise CalibrationError(f"{path}: compressed files are not read; unpack it: gunzip {path.name}")
    if suffix == ".parquet":
        return parquet_rows(path, rows)
    if (size := path.stat().st_size) > MOST_BYTES:
        raise rows.too_long(f"{size:,} bytes, more")
    raw = read_small(path, MOST_BYTES, CalibrationError)
    if b"\r" in raw:  # lines of Windows, and of an old Mac
        raw = raw.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    try:
        if suffix == ".jsonl":
            return _json_lines(path, raw, rows)
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _no_utf8(path, error, 0) from None
    return csv_rows(path, text, rows) if suffix == ".csv" else iter([text])


def _no_utf8(path: Path, error: UnicodeDecodeError, before: int) -> CalibrationError:
    return CalibrationError(
        f"{path} is not UTF-8 text: {error.reason} at byte {before + error.start}; convert it, for example with "
        f"iconv -f ISO-8859-1 -t UTF-8"
    )


def _json_lines(path: Path, raw: bytes, rows: Rows) -> Iterator[Document]:
    if raw.count(b"\n") > bounds.MOST_ROWS:  # empty lines too: each takes time
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


def _dataset(source: str, rows: Rows) -> Iterator[Document]:
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    use_a_file = "name a local .txt, .jsonl, .csv or .parquet file instead, or 'builtin'"
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
    return (
        document
        for number, record in enumerate(records, 1)
        for document in rows.document(without_null_keys(record), f"dataset {source}, row {number}")
    )
