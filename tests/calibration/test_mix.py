"""The built-in mix: small, of several kinds, and fit for models with and without a chat template."""

from pathlib import Path

import pytest
from tests.calibration.conftest import TEMPLATE, MakeTokenizer

from bitwright.calibration import mix
from bitwright.calibration.rows import Chat
from bitwright.calibration.segments import calibration_segments
from bitwright.calibration.texts import documents_of
from bitwright.core.errors import CalibrationError

CHATS = sum(isinstance(document, Chat) for document in mix.documents())


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_it_is_small_and_of_several_kinds() -> None:
    files = {path.stem: path.stat().st_size for path in mix.FOLDER.iterdir()}
    assert sorted(files) == ["chat", "code", "languages", "prose"]
    assert sum(files.values()) < 300_000
    documents = list(mix.documents())
    assert all(isinstance(document, Chat) or document.strip() for document in documents)
    assert len({str(document) for document in documents}) == len(documents)
    assert any(document.tools for document in documents if isinstance(document, Chat))
    assert {ord(letter) >> 8 for document in documents if isinstance(document, str) for letter in document} >= {
        *(0x04, 0x06, 0x09, 0x30, 0x4E, 0xAC)  # Cyrillic, Arabic, Devanagari, Japanese, Chinese, Korean
    }


def test_chats_go_through_the_template(tokenizer: MakeTokenizer) -> None:
    notes, found = list[str](), tokenizer("<s> $A", TEMPLATE)
    segments = calibration_segments("mix", found, samples=20, seqlen=512, seed=0, say=notes.append)
    assert segments.tokens.shape == (20, 512) and notes == []
    assert "<user>" in found.inner.decode(segments.tokens.flatten().tolist())


def test_a_base_model_gets_transcripts(tokenizer: MakeTokenizer) -> None:
    notes, found = list[str](), tokenizer()
    segments = calibration_segments("mix", found, samples=20, seqlen=512, seed=0, say=notes.append)
    assert notes == [f"the tokenizer has no chat template: the {CHATS} chats of the built-in mix are plain transcripts"]
    assert "User: " in found.inner.decode(segments.tokens.flatten().tolist())


def test_chats_that_a_template_refuses_are_left_out(tokenizer: MakeTokenizer) -> None:
    notes, refusing = list[str](), "{{ raise_exception('no') if messages[0].role == 'system' }}" + TEMPLATE
    calibration_segments("mix", tokenizer("$A", refusing), samples=2, seqlen=512, seed=0, say=notes.append)
    (note,) = notes
    assert f"of {CHATS} chats of the built-in mix are left out, because the model's chat template refuses them" in note


def test_all_of_it_is_used_if_more_is_asked_for(tokenizer: MakeTokenizer) -> None:
    notes = list[str]()
    found = calibration_segments("mix", tokenizer("$A", TEMPLATE), samples=10**6, seqlen=512, seed=0, say=notes.append)
    assert notes == [f"the built-in mix has {len(found.tokens)} segments of 512 tokens; all are used, and 1000000 were "
                     "asked for"]  # fmt: skip


def test_a_file_of_that_name_takes_precedence(tokenizer: MakeTokenizer) -> None:
    Path("mix").write_text("my own")
    assert documents_of("mix", "calibration") == ["my own"]


def test_it_is_no_text_to_measure_on() -> None:
    with pytest.raises(CalibrationError, match="'mix' is calibration data, no text to measure on"):
        documents_of("mix", "evaluation")
