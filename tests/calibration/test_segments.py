"""Segments: drawn by the seed, each beginning as the tokenizer has a text begin, from one source or from several."""

import hashlib
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.calibration.conftest import TEMPLATE, MakeTokenizer
from tests.conftest import byte_tokenizer

from bitwright.calibration.segments import Segments, calibration_segments
from bitwright.calibration.tokenizer import Tokenizer
from bitwright.calibration.tokens import fingerprint
from bitwright.core.errors import CalibrationError

BOS, EOS = 256, 257
PLAIN, WITH_BOS = (Tokenizer(byte_tokenizer(around), "MODEL") for around in ("$A", "<s> $A"))
TEXT = "".join(chr(33 + n % 90) for n in range(1000))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("segments") / "my.txt"
    path.write_text(TEXT)
    return str(path)


def segments(source: str, samples: int, seqlen: int, seed: int = 0, tokenizer: Tokenizer = PLAIN) -> Segments:
    return calibration_segments(source, tokenizer, samples=samples, seqlen=seqlen, seed=seed)


def test_the_same_seed_gives_the_same_segments(text: str) -> None:
    one, other = (segments(text, 8, 20, seed=5).tokens for _ in range(2))
    assert torch.equal(one, other)
    torch.manual_seed(99)
    assert torch.equal(segments(text, 8, 20, seed=5).tokens, one), "whatever else draws numbers"


def test_another_seed_gives_others(text: str) -> None:
    found = {tuple(segments(text, 8, 20, seed=seed).tokens.flatten().tolist()) for seed in range(10)}
    assert len(found) == 10


def test_drawing_leaves_other_random_numbers_alone(text: str) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    segments(text, 8, 20, seed=5)
    assert torch.equal(torch.rand(3), expected)


def test_without_a_bos_they_are_windows_of_the_text(text: str) -> None:
    """As they were before there was a look at the BOS: consecutive windows, in an order that torch draws."""
    tokens = torch.tensor(PLAIN.inner(TEXT).input_ids)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(3))[:8]
    found = segments(text, 8, 20, seed=3)
    assert torch.equal(found.tokens, tokens.view(50, 20)[order])
    assert found.beginning == () and found.begins_with is None


def test_with_a_bos_each_begins_with_it(text: str) -> None:
    found = segments(text, 50, 20, tokenizer=WITH_BOS)
    assert found.beginning == (BOS,) and found.begins_with == "<s>"
    assert (found.tokens[:, 0] == BOS).all() and (found.tokens[:, 1:] != BOS).all()
    decoded = {PLAIN.inner.decode(row[1:].tolist()) for row in found.tokens}
    assert len(decoded) == 50 and all(piece in TEXT for piece in decoded)


@given(st.integers(1, 50), st.integers(2, 50), st.sampled_from([PLAIN, WITH_BOS]), st.data())
def test_too_short_says_how_many_tokens_are_there_and_needed(
    samples: int, seqlen: int, tokenizer: Tokenizer, data: st.DataObject
) -> None:
    front = len(tokenizer.beginning)
    there = data.draw(st.integers(1, max(samples * (seqlen - front) - 1, 1)))
    if there >= samples * (seqlen - front):
        return
    with TemporaryDirectory() as folder:
        path = Path(folder) / "my.txt"
        path.write_text("x" * there)
        _ways_out(path, there, samples, seqlen, tokenizer)


def _ways_out(path: Path, there: int, samples: int, seqlen: int, tokenizer: Tokenizer) -> None:
    with pytest.raises(CalibrationError) as error:
        segments(str(path), samples, seqlen, tokenizer=tokenizer)
    message, front = str(error.value), len(tokenizer.beginning)
    beside = " beside the <s> with which each begins" if front else ""
    needed = samples * (seqlen - front)
    assert f"{samples} segments of {seqlen} tokens need {needed} tokens{beside}, but '{path}' has {there};" in message
    # Each way out that is named is one, as far as there is any.
    if "--samples " in message:
        fewer = int(message.rpartition("--samples ")[2].split(",")[0])
        assert segments(str(path), fewer, seqlen, tokenizer=tokenizer).tokens.shape == (fewer, seqlen)
    else:
        assert there < seqlen - front
    if " or --seqlen " in message:
        shorter = int(message.rpartition("--seqlen ")[2])
        assert segments(str(path), samples, shorter, tokenizer=tokenizer).tokens.shape == (samples, shorter)
    else:
        assert there < samples


def test_rows_that_are_too_short_in_sum(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "abc"}\n' * 10)
    with pytest.raises(CalibrationError) as error:
        segments(str(tmp_path / "rows.jsonl"), 4, 16)
    assert "4 segments of 16 tokens need 64 tokens, but " in str(error.value)
    assert "has 40 in 10 documents; take a longer text, or --samples 2, or --seqlen 10" in str(error.value)


def test_a_segment_of_nothing_but_its_beginning(text: str) -> None:
    with pytest.raises(CalibrationError, match="hold nothing but <s>, with which each begins; --seqlen must be at lea"):
        segments(text, 1, 1, tokenizer=WITH_BOS)


def test_a_seed_that_is_too_large_is_refused(text: str) -> None:
    with pytest.raises(CalibrationError, match="must be below 9223372036854775808"):
        segments(text, 1, 1, seed=2**63)


class TestRows:
    def test_short_rows_are_packed_with_an_eos_behind_each(self, tmp_path: Path) -> None:
        (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "{letter * 7}"}}\n' for letter in "abcdef"))
        found = segments(str(tmp_path / "rows.jsonl"), 3, 16)
        rows = sorted(PLAIN.inner.decode(row) for row in found.tokens.tolist())
        assert rows == ["aaaaaaa</s>bbbbbbb</s>", "ccccccc</s>ddddddd</s>", "eeeeeee</s>fffffff</s>"]

    def test_with_a_bos_in_front_of_each(self, tmp_path: Path) -> None:
        (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "{letter * 7}"}}\n' for letter in "abcdef"))
        found = segments(str(tmp_path / "rows.jsonl"), 3, 16, tokenizer=WITH_BOS)
        rows = sorted(PLAIN.inner.decode(row) for row in found.tokens.tolist())
        assert rows == ["<s>aaaaaaa<s>bbbbbbb", "<s>ccccccc<s>ddddddd", "<s>eeeeeee<s>fffffff"]

    def test_a_tokenizer_that_ends_texts_ends_each(self, tmp_path: Path) -> None:
        (tmp_path / "rows.jsonl").write_text('{"text": "aaaaaa"}\n{"text": "bbbbbb"}\n')
        found = segments(str(tmp_path / "rows.jsonl"), 1, 16, tokenizer=Tokenizer(byte_tokenizer("<s> $A </s>"), "M"))
        assert PLAIN.inner.decode(found.tokens[0].tolist()) == "<s>aaaaaa</s><s>bbbbbb</s>"

    def test_without_any_token_for_it_there_is_an_empty_line(self, tmp_path: Path) -> None:
        (tmp_path / "rows.jsonl").write_text('{"text": "aaaaaa"}\n{"text": "bbbbbb"}\n')
        alone = Tokenizer(byte_tokenizer("$A", eos=False), "M")
        found = segments(str(tmp_path / "rows.jsonl"), 1, 16, tokenizer=alone)
        assert alone.inner.decode(found.tokens[0].tolist()) == "aaaaaa\n\nbbbbbb\n\n"

    def test_chats_are_rendered_and_begin_once(self, tmp_path: Path, tokenizer: MakeTokenizer) -> None:
        row = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}\n'
        (tmp_path / "chat.jsonl").write_text(row * 4)
        found = segments(str(tmp_path / "chat.jsonl"), 2, 48, tokenizer=tokenizer("<s> $A", TEMPLATE))
        once = "<s><user>hi<assistant>yes</s>"
        assert PLAIN.inner.decode(found.tokens[0].tolist()).startswith(once)
        assert "<s><s>" not in PLAIN.inner.decode(found.tokens[0].tolist())


class TestShares:
    @pytest.fixture
    def files(self, tmp_path: Path) -> Path:
        for letter in "ab":
            (tmp_path / f"{letter}.txt").write_text(letter * 1000)
        return tmp_path

    def of(self, found: Segments) -> dict[str, int]:
        letters = "".join(PLAIN.inner.decode(row[-1:]) for row in found.tokens.tolist())
        return {letter: letters.count(letter) for letter in sorted(set(letters))}

    @pytest.mark.parametrize(
        ("shares", "counts"),
        [((":2", ":1"), {"a": 6, "b": 3}), (("", ""), {"a": 5, "b": 4}), ((":0.5", ":2.5"), {"a": 2, "b": 7})],
    )
    def test_segments_are_divided(self, shares: tuple[str, str], counts: dict[str, int], files: Path) -> None:
        asked = ",".join(f"{files / letter}.txt{share}" for letter, share in zip("ab", shares, strict=True))
        assert self.of(segments(asked, 9, 20)) == counts
        assert torch.equal(segments(asked, 9, 20, seed=4).tokens, segments(asked, 9, 20, seed=4).tokens)

    def test_they_are_mixed(self, files: Path) -> None:
        asked = f"{files}/a.txt,{files}/b.txt"
        letters = [PLAIN.inner.decode(row[:1]) for row in segments(asked, 40, 20).tokens.tolist()]
        assert letters != sorted(letters)

    def test_one_that_is_too_short_is_named(self, files: Path) -> None:
        with pytest.raises(CalibrationError) as error:
            segments(f"{files}/a.txt:1,{files}/b.txt:9", 100, 20)
        assert f"90 segments of 20 tokens need 1800 tokens, but '{files}/b.txt' has 1000" in str(error.value)
        assert "a smaller share of it" in str(error.value)

    def test_a_share_of_no_segment(self, files: Path) -> None:
        with pytest.raises(CalibrationError, match=r"of 4 segments none is left for '.*b\.txt' with its share of 1 in"):
            segments(f"{files}/a.txt:1000,{files}/b.txt", 4, 20)


def test_the_fingerprint_is_of_the_numbers() -> None:
    tokens = torch.tensor([[1, 2], [300, 4]])
    by_hand = b"".join(n.to_bytes(8, "little") for n in (1, 2, 300, 4))
    assert fingerprint(tokens) == hashlib.sha256(by_hand).hexdigest()
    assert fingerprint(tokens.to(torch.int32)) == fingerprint(tokens)
    assert fingerprint(tokens.T) != fingerprint(tokens)
