"""A text tokenized in pieces is the text tokenized at once."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from bitwright.calibration import tokens as module
from bitwright.calibration.tokens import AROUND, tokens_of
from bitwright.core.errors import CalibrationError
from bitwright.demo import MODEL_DIR
from bitwright.demo.texts import evaluation_text

Encode = Callable[[str], list[int]]
PIECE, OVERLAP = 700, 400
WORDS = st.sampled_from(
    ["a", "the ", " ", "  ", "\n", " \n", "\n\n", "1", "234", "don't", "é", "日本", "🙂", "<s>", "\t", "zz"]
)


def trained(tokenizer: Tokenizer, trainer: trainers.Trainer) -> Tokenizer:
    tokenizer.train_from_iterator(evaluation_text().splitlines(keepends=True), trainer)
    return tokenizer


def words_apart() -> Tokenizer:
    """Byte-level BPE, as of GPT-2 and Llama 3."""
    return Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))


def whole_text() -> Tokenizer:
    """BPE that sees the whole text as one word, as of Llama 2, with a token at either end."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    trained(tokenizer, trainers.BpeTrainer(vocab_size=700, special_tokens=special))
    ends = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return tokenizer


def unigram() -> Tokenizer:
    """The likeliest tokens, as of T5, after NFKC."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return trained(tokenizer, trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", special_tokens=["<unk>"]))


@pytest.fixture(scope="module", params=[words_apart, whole_text, unigram], ids=lambda make: make.__name__)
def encode(request: pytest.FixtureRequest) -> Encode:
    tokenizer = request.param()
    return lambda text: list(tokenizer.encode(text).ids)


def test_of_english(encode: Encode) -> None:
    """In pieces throughout: no call sees the whole text."""
    text, longest = evaluation_text()[:20_000], 0

    def noted(piece: str) -> list[int]:
        nonlocal longest
        longest = max(longest, len(piece))
        return encode(piece)

    assert tokens_of(text, noted, piece=PIECE, overlap=OVERLAP).tolist() == encode(text)
    assert longest == PIECE + OVERLAP


@given(pieces=st.lists(WORDS, max_size=1200), repeated=st.integers(1, 3))
def test_of_anything(encode: Encode, pieces: list[str], repeated: int) -> None:
    text = "".join(pieces) * repeated
    assert tokens_of(text, encode, piece=PIECE, overlap=OVERLAP).tolist() == encode(text)


@pytest.mark.parametrize("length", [0, 1, PIECE, PIECE + 1, 2 * PIECE])
def test_lengths(encode: Encode, length: int) -> None:
    text = evaluation_text()[:length]
    tokens = tokens_of(text, encode, piece=PIECE, overlap=OVERLAP)
    assert tokens.dtype == torch.int64 and tokens.tolist() == encode(text)


def test_whole_where_pieces_differ() -> None:
    """A tokenizer to which a text is more than its parts is given all of it."""

    def by_place(text: str) -> list[int]:
        return list(range(len(text)))

    assert tokens_of("x" * 5000, by_place, piece=PIECE, overlap=OVERLAP).tolist() == list(range(5000))


def test_whole_where_tokens_are_too_long() -> None:
    """An overlap of fewer tokens than have to agree joins nothing."""

    def runs(text: str) -> list[int]:
        ends = [0, *(n for n in range(1, len(text)) if text[n] != text[n - 1]), len(text)]
        return [end - start for start, end in pairwise(ends)]

    text = ("a" * 50 + "b" * 30) * 40
    assert OVERLAP / 40 < 2 * AROUND
    assert tokens_of(text, runs, piece=PIECE, overlap=OVERLAP).tolist() == runs(text)


def test_no_long_text_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizing a whole text takes 200 times its memory."""
    monkeypatch.setattr(module, "LONGEST_WHOLE", 1000)
    with pytest.raises(CalibrationError, match="at once it tokenizes 1,000 characters at most; the text has 5,000"):
        tokens_of("x" * 5000, lambda text: list(range(len(text))), piece=100, overlap=20)
