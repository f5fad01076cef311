"""Rows of .jsonl, .csv and .parquet files and of datasets: each is a text, or the messages of a chat."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitwright.core.errors import CalibrationError
from bitwright.core.small_files import MIB

TEXT_FIELD = "text"
CHAT_FIELDS = ("messages", "conversations")
FIELDS = (*CHAT_FIELDS, TEXT_FIELD)
"""The fields that are looked for if none is named; the first that a row has counts."""
TOOLS_FIELD = "tools"
MOST_BYTES, MOST_ROWS = 32 * MIB, 1_500_000
"""The most bytes of text (all files together, or all documents of a dataset), and the most rows.

All of the text is tokenized, whatever number of samples or windows is taken from it.
"""
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell one, UTF-8 and tokenizers cannot


@dataclass(frozen=True)
class Chat:
    """The messages of a conversation, and the tools it may call, as the row holds them.

    ``where`` is the row, ``fields`` are the names of all its fields; both are for messages of errors.
    """

    messages: Sequence[Any]
    tools: Sequence[Any] | None
    where: str
    field: str
    fields: tuple[str, ...]


Document = str | Chat
"""What a row or a text file holds."""


class Rows:
    """The rows of a source: those without text are counted, and their number and bytes are bounded.

    ``field`` is the field that was asked for, None: the first of ``FIELDS`` that a row has.
    """

    def __init__(self, source: str, field: str | None = None) -> None:
        self.source, self.field, self.read, self.empty, self.nbytes = source, field, 0, 0, 0
        self.used = set[str]()

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that are looked for, the first first."""
        return FIELDS if self.field is None else (self.field,)

    def document(self, record: object, where: str) -> Iterator[Document]:
        """Yield the text or the chat of a row; nothing if it is null, or a chat without messages."""
        self.read += 1
        if self.read > MOST_ROWS:
            raise self.too_many()
        present = [field for field in self.fields if isinstance(record, dict) and field in record]
        if not isinstance(record, dict) or not present:
            raise self.absent(record, where)
        field = next((field for field in present if record[field] not in (None, [])), None)
        self.used.update(present)
        if field is None:
            self.empty += 1
        else:
            yield _document(record, field, where)

    def absent(self, record: object, where: str) -> CalibrationError:
        """The error for a row without any of the fields."""
        names = list(map(str, record)) if isinstance(record, dict) else []
        content = f"the fields are {_listed(names)}" if isinstance(record, dict) else type(record).__name__
        if self.field is not None:
            return CalibrationError(f"{where} has no field '{self.field}' (--text-field); found: {content}")
        other = "; name one with --text-field" if names else ""
        return CalibrationError(
            f"{where} has no text in the field '{TEXT_FIELD}', and no chat in {' or '.join(CHAT_FIELDS)}; found: "
            f"{content}{other}"
        )

    def within_bounds(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Yield the documents. Raises CalibrationError once they are too long together."""
        for document in documents:
            self.nbytes += _length(document)
            if self.nbytes > MOST_BYTES:
                raise self.too_long("more")
            yield document

    def too_many(self) -> CalibrationError:
        """The error for more rows than are read."""
        return CalibrationError(f"'{self.source}' has more than {MOST_ROWS:,} rows; take a part of them")

    def too_long(self, nbytes: str) -> CalibrationError:
        """The error for a text that is too long."""
        return CalibrationError(
            f"'{self.source}' has {nbytes} than the {MOST_BYTES:,} bytes of text that are read; all of a text is "
            f"tokenized, so take a part of it: head -c {MOST_BYTES // 2} of a .txt, head -n of a .jsonl, or fewer files"
        )

    @property
    def notes(self) -> Iterator[str]:
        """How many rows have no text. Raises CalibrationError if none has."""
        names = " and ".join(f"'{field}'" for field in self.fields if field in self.used)
        null = f"{names} is null" if self.used <= {TEXT_FIELD} else f"{names} is null or empty"
        if self.empty and self.empty == self.read:
            raise CalibrationError(f"'{self.source}' holds no text: {null} in all of its {self.read:,} rows")
        if self.empty:
            yield f"{self.empty:,} of {self.read:,} rows of '{self.source}' have no text ({null}), and are left out"


def require_characters(text: str, where: str) -> str:
    """The text. Raises CalibrationError for one that UTF-8 cannot spell."""
    if _LONE_SURROGATE.search(text):
        raise CalibrationError(f"{where} has half of a surrogate pair in its text, which is no character; mend it")
    return text


def _document(record: Mapping[str, Any], field: str, where: str) -> Document:
    """The text or the chat in a field."""
    value = record[field]
    if field in CHAT_FIELDS and isinstance(value, str):
        value = _parsed(value, field, where)
    if isinstance(value, str):
        return require_characters(str(value), where)
    if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        return Chat(value, _tools(record.get(TOOLS_FIELD), where), where, field, tuple(map(str, record)))
    raise CalibrationError(
        f"{where} has no text in the field '{field}'; found: '{field}' is of type {type(value).__name__}"
    )


def _tools(value: Any, where: str) -> Sequence[Any] | None:
    """The tools of a chat; some data sets spell them as JSON in a text."""
    tools = _parsed(value, TOOLS_FIELD, where) if isinstance(value, str) and value.strip() else value
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise CalibrationError(f"{where}: '{TOOLS_FIELD}' is no list of objects (JSON Schema); mend or remove it")
    return tools


def _parsed(text: str, field: str, where: str) -> Any:
    """The list that a field spells as JSON in a text, as .csv has to."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{where}: '{field}' is a text, and no list in JSON: {str(error)[:200]}") from None


def _length(document: Document) -> int:
    """The characters of a document; those of a chat are bounded again once it is rendered."""
    if isinstance(document, str):
        return len(document)
    values = (value for message in document.messages for value in message.values())
    return sum(len(value) for value in values if isinstance(value, str))


def _listed(names: Sequence[str]) -> str:
    """At most 20 names, none longer than a line."""
    return ", ".join(name[:40] for name in names[:20]) + (", ..." if len(names) > 20 else "")
