"""Tokenizers as GGUF lists them, and those that it cannot express. That llama.cpp then makes the same tokens of a text
is measured with the client itself (docs/formats/gguf.md)."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.formats.gguf import trained
from tests.formats.gguf.conftest import Models
from tokenizers import Tokenizer

from bitwright.core.errors import CheckpointError, RecipeError
from bitwright.core.format import WriteOptions
from bitwright.formats import gguf
from bitwright.formats.gguf.sentencepiece import parse
from bitwright.formats.gguf.tokenizer import tokenizer

Changes = Callable[[dict[str, Any]], object]
CONFIG = {"bos_token_id": 0, "eos_token_id": [1, 2]}


def entries(folder: Path, rows: int = 512, **config: Any) -> dict[str, Any]:
    return {entry.key.removeprefix("tokenizer."): entry.value for entry in tokenizer(folder, config, rows).entries()}


def changed(folder: Path, changes: Changes, file: str = "tokenizer.json") -> Path:
    found = json.loads((folder / file).read_text())
    changes(found)
    (folder / file).write_text(json.dumps(found))
    return folder


@pytest.fixture
def byte_level(tmp_path: Path) -> Path:
    trained.byte_level(tmp_path, "gpt-2")
    return tmp_path


@pytest.fixture
def byte_fallback(tmp_path: Path) -> Path:
    trained.byte_fallback(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", trained.BYTE_LEVEL)
def test_pre_tokenizers_are_known_by_how_they_cut(name: str, tmp_path: Path) -> None:
    trained.byte_level(tmp_path, name)
    found = entries(tmp_path)
    assert (found["ggml.model"], found["ggml.pre"]) == ("gpt2", name)


def test_byte_level_tokens_merges_and_types(byte_level: Path) -> None:
    file = json.loads((byte_level / "tokenizer.json").read_text())
    used = len(file["model"]["vocab"])
    found = entries(byte_level, rows=used + 8)
    assert all(found["ggml.tokens"][n] == token for token, n in file["model"]["vocab"].items())
    assert found["ggml.tokens"][used:] == [f"[PAD{n}]" for n in range(used, used + 8)]
    assert found["ggml.token_type"] == [3, 3, 3] + [1] * (used - 3) + [5] * 8
    assert found["ggml.merges"] == [" ".join(pair) for pair in file["model"]["merges"]]
    assert "ggml.scores" not in found
    assert (found["ggml.bos_token_id"], found["ggml.eos_token_id"]) == (0, 1)


def test_a_byte_is_a_token(byte_level: Path) -> None:
    changed(byte_level, lambda f: (f["model"].update(merges=[]), f["pre_tokenizer"].update(use_regex=False)))
    found = entries(byte_level)
    (pair,) = found["ggml.merges"]
    assert found["ggml.pre"] == "gpt-2"
    assert all(len(word) > 1 for word in pair.split(" "))  # of no byte alone


def test_what_begins_a_text_is_what_the_template_says(tmp_path: Path) -> None:
    for bos in (False, True):
        trained.byte_level(tmp_path, "gpt-2", bos=bos)
        assert (entries(tmp_path)["ggml.add_bos_token"], entries(tmp_path)["ggml.add_eos_token"]) == (bos, False)
    changed(tmp_path, lambda found: found.update(add_bos_token=False), "tokenizer_config.json")
    assert entries(tmp_path)["ggml.add_bos_token"] is False
    changed(tmp_path, lambda found: found["post_processor"]["single"][0]["SpecialToken"].update(id="<pad>"))
    with pytest.raises(RecipeError, match=r"\['<pad>', None\].*llama.cpp adds bos and eos"):
        entries(tmp_path)


def test_special_tokens_by_name_else_by_number(byte_level: Path) -> None:
    named = {"bos_token": {"content": "<pad>"}, "eos_token": None}
    changed(byte_level, lambda found: found.update(named), "tokenizer_config.json")
    found = entries(byte_level, eos_token_id=[1, 2])
    assert (found["ggml.bos_token_id"], found["ggml.eos_token_id"]) == (2, 1)
    with pytest.raises(RecipeError, match="no token that ends a text"):
        entries(byte_level)


def test_chat_templates(byte_level: Path) -> None:
    more = [{"name": "tool", "template": "T"}, {"name": "default", "template": "D"}, {"name": "rag", "template": "R"}]
    changed(byte_level, lambda found: found.update(chat_template=more), "tokenizer_config.json")
    found = entries(byte_level)
    assert (found["chat_template"], found["chat_template.rag"], found["chat_templates"]) == ("D", "R", ["rag", "tool"])
    (byte_level / "chat_template.jinja").write_text("{{ J }}")
    assert entries(byte_level)["chat_template"] == "{{ J }}"


def test_added_tokens(byte_level: Path) -> None:
    new = {"id": 512, "content": "<tool>", "special": False}
    changed(byte_level, lambda found: found["added_tokens"].append(new))
    found = entries(byte_level, rows=513)
    assert (found["ggml.tokens"][512], found["ggml.token_type"][512]) == ("<tool>", 4)
    with pytest.raises(RecipeError, match=r"'<tool>' has id 512, the embedding 512 rows"):
        entries(byte_level)


def test_sentencepiece_from_its_own_file_and_from_the_other_merge_alike(tmp_path: Path) -> None:
    scores = trained.byte_fallback(tmp_path, pieces=True)
    with_pieces = entries(tmp_path, rows=len(scores))
    (tmp_path / "tokenizer.model").unlink()
    without = entries(tmp_path, rows=len(scores))
    assert with_pieces["ggml.scores"] == list(scores.values())
    order = [token for token in scores if any(pair.replace(" ", "") == token for pair in merges_of(tmp_path))]
    for found in (with_pieces, without):
        by_token = dict(zip(found["ggml.tokens"], found["ggml.scores"], strict=True))
        assert sorted(order, key=lambda token: -by_token[token]) == order
        assert found["ggml.model"] == "llama"
        assert found["ggml.token_type"][:4] == [2, 3, 3, 6]
        assert found["ggml.token_type"] == with_pieces["ggml.token_type"]
        assert (found["ggml.add_bos_token"], found["ggml.add_space_prefix"]) == (True, True)


def merges_of(folder: Path) -> list[str]:
    return [" ".join(pair) for pair in json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]]


def test_a_tokenizer_model_alone(tmp_path: Path) -> None:
    scores = trained.byte_fallback(tmp_path, pieces=True, prefix=False)
    (tmp_path / "tokenizer.json").unlink()
    found = entries(tmp_path, rows=len(scores))
    assert found["ggml.tokens"] == list(scores)
    assert (found["ggml.add_bos_token"], found["ggml.add_space_prefix"]) == (True, False)


def test_a_damaged_tokenizer_model_is_an_error_that_helps(tmp_path: Path) -> None:
    raw = trained.sentencepiece({"<unk>": 0.0, "a": -1.0})
    assert [piece.text for piece in parse(raw, "x").pieces] == ["<unk>", "a"]
    for damaged in (raw[:-3], b"", b"\xff" * 30, raw[:4] + b"\xff\xff" + raw[6:]):
        with pytest.raises(CheckpointError, match="SentencePiece model"):
            parse(damaged, "tokenizer.model")
    with pytest.raises(RecipeError, match="no BPE"):
        _refused(tmp_path, trained.sentencepiece({"a": 0.0}, kind=1))


def _refused(folder: Path, raw: bytes) -> None:
    (folder / "tokenizer.model").write_bytes(raw)
    tokenizer(folder, {"eos_token_id": 0}, 1)


CANNOT: dict[str, tuple[str, Changes]] = {
    "cuts otherwise": ("no pre-tokenizer", lambda f: f.update(pre_tokenizer={"type": "Whitespace"})),
    "cuts not at all": ("no pre-tokenizer", lambda f: f["pre_tokenizer"].update(use_regex=False)),
    "a space in front": ("no pre-tokenizer", lambda f: f["pre_tokenizer"].update(add_prefix_space=True)),
    "whole words": ("whole words taken", lambda f: f["model"].update(ignore_merges=True)),
    "spaces in merges": ("a space within", lambda f: f["model"]["merges"].append([" a", "b"])),
    "lower case": ("normalizes no text", lambda f: f.update(normalizer={"type": "Lowercase"})),
    "unigram": ("tokenizer.json is Unigram", lambda f: f["model"].update(type="Unigram")),
    "dropout": ("no BPE with dropout", lambda f: f["model"].update(dropout=0.1)),
    "two alike": ("two tokens are called '<pad>'", lambda f: f["added_tokens"].append({"id": 9, "content": "<pad>"})),
}


@pytest.mark.parametrize("what", CANNOT)
def test_refused_before_the_work_with_a_way_out(what: str, model: Models, tmp_path: Path) -> None:
    says, changes = CANNOT[what]
    folder = Path(shutil.copytree(model("tied"), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    gguf.check(config, folder, WriteOptions())
    with pytest.raises(RecipeError, match=says) as refusal:
        gguf.check(config, changed(folder, changes), WriteOptions())
    assert "--base" in str(refusal.value)


def test_merges_that_no_scores_could_say(byte_fallback: Path) -> None:
    rows = 2 * len(merges_of(byte_fallback))
    merges = json.loads((byte_fallback / "tokenizer.json").read_text())["model"]["merges"]
    twice = next(n for n, pair in enumerate(merges[1:], 1) if "".join(merges[n - 1]) == "".join(pair))
    changed(byte_fallback, lambda f: f["model"]["merges"].pop(twice))
    with pytest.raises(RecipeError, match="never merges"):
        entries(byte_fallback, rows)
    changed(byte_fallback, lambda f: f["model"]["merges"].append(merges[twice]))
    with pytest.raises(RecipeError, match="with others in between"):
        entries(byte_fallback, rows)


def test_text_prepared_otherwise_before_sentencepiece(byte_fallback: Path) -> None:
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    changed(byte_fallback, lambda f: f.update(normalizer=None, pre_tokenizer=metaspace))
    assert entries(byte_fallback, 1000)["ggml.add_space_prefix"] is True
    changed(byte_fallback, lambda f: f["pre_tokenizer"].update(prepend_scheme="never"))
    assert entries(byte_fallback, 1000)["ggml.add_space_prefix"] is False
    changed(byte_fallback, lambda f: f["pre_tokenizer"].update(split=True))
    with pytest.raises(RecipeError, match="prepares text"):
        entries(byte_fallback, 1000)


@pytest.mark.parametrize(("pair", "says", "theirs"), [
    (["zzzz", "qqqq"], r"merges \('zzzz', 'qqqq'\), and has no token 'zzzz'", "Token `zzzz` out of vocabulary"),
    (["e", "qqqq"], r"and has no token 'qqqq'", "Token `qqqq` out of vocabulary"),
    ("e zzzz", r"and has no token 'zzzz'", "MergeType"),
    (["e", "z"], r"merges \('e', 'z'\), and has no token 'ez'", "Token `ez` out of vocabulary"),
])  # fmt: skip
def test_merges_of_pieces_that_are_no_tokens(pair: Any, says: str, theirs: str, byte_level: Path) -> None:
    """The tokenizers library refuses them as well."""
    entries(byte_level)
    changed(byte_level, lambda f: f["model"]["merges"].append(pair))
    with pytest.raises(CheckpointError, match=rf"{says}: the tokenizers library does not load it.*copy it from"):
        entries(byte_level)
    with pytest.raises(Exception, match=theirs):
        Tokenizer.from_file(str(byte_level / "tokenizer.json"))


def test_merges_of_sentencepiece_that_are_no_tokens(byte_fallback: Path) -> None:
    changed(byte_fallback, lambda f: f["model"]["merges"].append(["zzzz", "qqqq"]))
    with pytest.raises(CheckpointError, match="has no token 'zzzz'"):
        entries(byte_fallback, 1000)


def test_no_tokenizer_and_one_that_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        entries(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(CheckpointError, match="not what tokenizers writes"):
        entries(tmp_path)
