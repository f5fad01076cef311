"""The source of calibration and evaluation data: a file, a folder, or a dataset of the Hugging Face hub."""

import json
import re
from collections.abc import Iterator
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

from bitwright.core.errors import CalibrationError
from bitwright.demo import texts

BUILTIN = "builtin"
SUFFIXES = (".txt", ".jsonl", ".parquet")
TEXT_FIELD = "text"
BETWEEN_DOCUMENTS = "\n\n"
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell one, UTF-8 and tokenizers cannot


def text_of(source: str, purpose: str) -> str:
    """Read the text that ``--calibration`` or ``--text`` names; ``builtin`` is the embedded model's text.

    ``purpose`` is "calibration" or "evaluation". Raises CalibrationError.
    """
    if not source:
        raise CalibrationError(f"an empty name was given for the {purpose} text; name a file or a folder, or 'builtin'")
    if source == BUILTIN:
        return texts.calibration_text() if purpose == "calibration" else texts.evaluation_text()
    if get_close_matches(source, [BUILTIN], cutoff=0.75) and not Path(source).exists():
        raise CalibrationError(f"there is no {purpose} text '{source}'; did you mean {BUILTIN}?")
    text = read_text(source)
    if not text.strip():
        raise CalibrationError(f"'{source}' holds no text: it is empty")
    return text


def read_text(source: str) -> str:
    """Read a .txt, .jsonl or .parquet file, a folder of them, or a dataset ``name[:config[:split]]``.

    Documents of .jsonl, .parquet and datasets are their field ``text``; documents are joined by an empty line. Raises
    CalibrationError.
    """
    path = Path(source)
    try:
        path.exists()
    except OSError as error:  # the name is too long; perhaps it is a text
        raise CalibrationError(f"'{source[:60]}...' cannot be read: {error.strerror}; write it to a file") from None
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not files:
            raise CalibrationError(f"folder {path} holds no text: no {', '.join(SUFFIXES)} file was found in it")
        return BETWEEN_DOCUMENTS.join(_read_file(file) for file in files)
    if path.is_file():
        return _read_file(path)
    if path.suffix in SUFFIXES or path.is_absolute() or source.startswith("."):
        raise CalibrationError(f"there is no text file or folder {path}; name one, 'builtin', or a dataset of the hub")
    return BETWEEN_DOCUMENTS.join(_dataset(source))


def _read_file(path: Path) -> str:
    if path.suffix.lower() == ".json":
        raise CalibrationError(
            f"{path}: .json is not read; write one object per line, with a field '{TEXT_FIELD}', as .jsonl"
        )
    if path.suffix.lower() == ".parquet":
        return BETWEEN_DOCUMENTS.join(_parquet(path))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}; convert it, for example with "
            f"iconv -f ISO-8859-1 -t UTF-8"
        ) from None
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}") from None
    if path.suffix.lower() == ".jsonl":
        return BETWEEN_DOCUMENTS.join(_json_lines(path, text))
    return text


def _json_lines(path: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"{path}, line {number} is not JSON: {error}; mend or remove the line") from None
        yield _text_of(record, f"{path}, line {number}")


def _text_of(record: object, where: str) -> str:
    if isinstance(record, dict) and isinstance(text := record.get(TEXT_FIELD), str):
        if _LONE_SURROGATE.search(text):
            raise CalibrationError(f"{where} has half of a surrogate pair in its text, which is no character; mend it")
        return str(text)
    if isinstance(record, dict) and TEXT_FIELD in record:
        content = f"'{TEXT_FIELD}' is of type {type(record[TEXT_FIELD]).__name__}"
    else:
        content = f"the fields are {', '.join(map(str, record))}" if isinstance(record, dict) else type(record).__name__
    raise CalibrationError(f"{where} has no text in the field '{TEXT_FIELD}'; found: {content}")


def _parquet(path: Path) -> Iterator[str]:
    if find_spec("pyarrow") is None:
        raise CalibrationError(f"reading {path} needs pyarrow: pip install 'bitwright[data]', or use a .txt file")
    import pyarrow
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(path)
        if TEXT_FIELD not in schema.names:
            raise CalibrationError(f"{path} has no column '{TEXT_FIELD}'; it has {', '.join(schema.names)}")
        values = pyarrow.parquet.read_table(path, columns=[TEXT_FIELD])[TEXT_FIELD].to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # ValueError: text that is no UTF-8
        raise CalibrationError(f"{path} cannot be read as Parquet: {error}") from None
    rows = ((number, value) for number, value in enumerate(values, start=1) if value is not None)
    return (_text_of({TEXT_FIELD: value}, f"{path}, row {number}") for number, value in rows)


def _dataset(source: str) -> Iterator[str]:
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
        rows = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # the library raises many kinds: offline, unknown name, gated, broken
        raise CalibrationError(
            f"'{source}' is no local file or folder, and the dataset of that name could not be loaded "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}); {use_a_file}"
        ) from None
    return (_text_of(dict(row), f"dataset {source}") for row in rows)
