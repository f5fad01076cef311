"""Chats: both spellings, tools, the model's own template, and errors that name the row."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.calibration.conftest import TEMPLATE, MakeTokenizer

from bitwright.calibration.chat import rendered
from bitwright.calibration.rows import Chat
from bitwright.calibration.texts import read_documents
from bitwright.core.errors import CalibrationError

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
OTHER = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
TOOL = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {}}}


def written(folder: Path, kind: str, rows: Sequence[dict[str, Any]]) -> str:
    path = folder / f"chat.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        import csv

        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({key: json.dumps(value) for key, value in row.items()} for row in rows)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def texts(source: str, make: MakeTokenizer, template: str | None = TEMPLATE, field: str | None = None) -> list[str]:
    inner = make("<s> $A", template).inner
    documents = read_documents(source, field=field)
    return [rendered(one, inner, "MODEL") if isinstance(one, Chat) else one for one in documents]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
@pytest.mark.parametrize("field", ["messages", "conversations"])
@pytest.mark.parametrize("turns", [TURNS, OTHER], ids=["role", "from"])
def test_both_spellings_in_every_kind_of_file(
    kind: str, field: str, turns: list[Any], tmp_path: Path, tokenizer: MakeTokenizer
) -> None:
    source = written(tmp_path, kind, [{field: turns}, {field: turns[:1]}])
    assert texts(source, tokenizer) == ["<s><user>hi<assistant>yes</s>", "<s><user>hi</s>"]


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])], ids=["list", "text"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_tools_are_passed_to_the_template(kind: str, tools: Any, tmp_path: Path, tokenizer: MakeTokenizer) -> None:
    tool = TOOL | {"function": {"name": "look", "description": "Look."}}  # Parquet has no empty structs
    tools = json.dumps([tool]) if isinstance(tools, str) else [tool]
    source = written(tmp_path, kind, [{"messages": TURNS, "tools": tools}])
    assert texts(source, tokenizer) == ["<s>[1 tools: look]<user>hi<assistant>yes</s>"]


def test_null_keys_that_parquet_adds_are_not_shown_to_the_template(tmp_path: Path, tokenizer: MakeTokenizer) -> None:
    turns = [{"role": "user", "content": "hi", "name": None}, {"role": "tool", "content": "x", "name": "look"}]
    source = written(tmp_path, "parquet", [{"messages": turns}])
    template = "{% for m in messages %}{{ m.keys() | list }}{% endfor %}"
    assert texts(source, tokenizer, template) == ["['role', 'content']['role', 'content', 'name']"]


def test_a_field_by_name_holds_texts_or_chats(tmp_path: Path, tokenizer: MakeTokenizer) -> None:
    source = written(tmp_path, "jsonl", [{"messages": TURNS, "body": "plain"}, {"body": OTHER, "text": "no"}])
    assert texts(source, tokenizer, field="body") == ["plain", "<s><user>hi<assistant>yes</s>"]


def test_a_chat_is_preferred_to_a_text_beside_it(tmp_path: Path, tokenizer: MakeTokenizer) -> None:
    rows: list[dict[str, Any]] = [{"text": "a", "messages": TURNS}, {"text": "b", "messages": None}, {"text": "c"}]
    found = texts(written(tmp_path, "jsonl", rows), tokenizer)
    assert found == ["<s><user>hi<assistant>yes</s>", "b", "c"]


def test_parts_of_text_become_one(tmp_path: Path, tokenizer: MakeTokenizer) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    source = written(tmp_path, "jsonl", [{"messages": [{"role": "user", "content": parts}]}])
    assert texts(source, tokenizer) == ["<s><user>ab</s>"]


def test_without_a_template_the_error_says_what_would_do(tmp_path: Path, tokenizer: MakeTokenizer) -> None:
    source = written(tmp_path, "jsonl", [{"id": 1, "messages": TURNS, "summary": "x"}])
    with pytest.raises(CalibrationError) as error:
        texts(source, tokenizer, None)
    message = str(error.value)
    assert f"{source}, line 1 is a chat (field 'messages'), and the tokenizer in MODEL has no chat template" in message
    assert "name a field that holds text: --text-field NAME; its other fields are id, summary" in message


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            {"messages": [{"role": "wizard", "content": "x"}]},
            "line 2: the chat template in MODEL cannot render",
        ),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "no role wizard); mend the row or leave it out"),
        ({"messages": [{"content": "x"}]}, "line 2, message 1 has no role: neither 'role' and 'content', nor 'from'"),
        ({"messages": [{"from": "elf", "value": "x"}]}, "line 2, message 1 is from 'elf', and the names are human"),
        ({"messages": [{"role": "user"}]}, "line 2, message 1 ('user') has no content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "has a part of type 'image', and only text"),
        ({"messages": "no list"}, "line 2: 'messages' is a text, and no list in JSON"),
        ({"messages": {"role": "user"}}, "found: 'messages' is of type dict"),
        ({"messages": ["hi"]}, "found: 'messages' is of type list"),
        ({"messages": TURNS, "tools": ["look"]}, "line 2: 'tools' is no list of objects"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "line 2 has half of a surrogate pair"),
    ],
)
def test_errors_name_the_row(row: dict[str, Any], says: str, tmp_path: Path, tokenizer: MakeTokenizer) -> None:
    source = written(tmp_path, "jsonl", [{"messages": TURNS}, row])
    with pytest.raises(CalibrationError) as error:
        texts(source, tokenizer)
    assert says in str(error.value)


def test_a_template_runs_no_code(tmp_path: Path, tokenizer: MakeTokenizer) -> None:
    hostile = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    source = written(tmp_path, "jsonl", [{"messages": TURNS}])
    with pytest.raises(CalibrationError, match="cannot render this chat"):
        texts(source, tokenizer, hostile)


def test_rows_without_messages_are_left_out_and_counted(tmp_path: Path, tokenizer: MakeTokenizer) -> None:
    notes = list[str]()
    source = written(tmp_path, "jsonl", [{"messages": TURNS}, {"messages": None}, {"messages": []}])
    assert len(read_documents(source, notes.append)) == 1
    assert notes == [f"2 of 3 rows of '{source}' have no text ('messages' is null or empty), and are left out"]


def test_a_parquet_of_chats_that_would_fill_the_memory(tmp_path: Path) -> None:
    """A long value, once in the dictionary, and again and again in the messages."""
    row = [{"role": "user", "content": "x" * 10**6}] * 100
    source = written(tmp_path, "parquet", [{"messages": row}])
    assert Path(source).stat().st_size < 2 * 10**6
    with pytest.raises(CalibrationError, match="has more than the 33,554,432 bytes of text that are read"):
        read_documents(source)
