"""What a tokenizer puts around a text is asked of it, not read in its config."""

import pytest
from tests.calibration.conftest import TEMPLATE, MakeTokenizer
from tests.conftest import SHARED

from bitwright.calibration.rows import Chat
from bitwright.calibration.tokens import PIECE
from bitwright.demo import MODEL_DIR
from bitwright.model.source import open_tokenizer

BOS, EOS = 256, 257


@pytest.mark.parametrize(
    ("around", "beginning", "ending", "words"),
    [
        ("$A", (), (), None),
        ("<s> $A", (BOS,), (), "<s>"),
        ("$A </s>", (), (EOS,), None),
        ("<s> <s> $A </s>", (BOS, BOS), (EOS,), "<s><s>"),
    ],
)
def test_what_stands_around_a_text(
    around: str, beginning: tuple[int, ...], ending: tuple[int, ...], words: str | None, tokenizer: MakeTokenizer
) -> None:
    found = tokenizer(around)
    assert (found.beginning, found.ending, found.begins_with) == (beginning, ending, words)


def test_a_bos_that_is_named_and_never_used() -> None:
    """As in the config of many models, the embedded one among them."""
    found = open_tokenizer(MODEL_DIR)
    assert found.inner.ask("bos_token") == "<s>" and found.beginning == ()


def test_the_models_beside_the_repository() -> None:
    folder = SHARED / "models" / "en-llama"
    if not folder.is_dir():
        pytest.skip("no folder of larger models beside the repository")
    assert open_tokenizer(folder).beginning == ()


def test_one_document_is_what_the_tokenizer_gives(tokenizer: MakeTokenizer) -> None:
    for around in ("$A", "$A </s>"):
        found = tokenizer(around)
        (tokens,) = found.documents(["abc\n\ndef"])
        assert tokens.tolist() == found.inner("abc\n\ndef").input_ids == found.stream("abc\n\ndef").tolist()


def test_long_and_short_documents_and_empty_ones(tokenizer: MakeTokenizer) -> None:
    documents = ["a" * (PIECE + 7), "", "bc", "d" * PIECE, ""]
    lengths = [len(tokens) for tokens in tokenizer().documents(documents)]
    assert lengths == [PIECE + 8, 3, PIECE + 1], "each with an EOS behind it"


def test_a_chat_that_begins_and_ends_by_itself_does_so_once(tokenizer: MakeTokenizer) -> None:
    chat = Chat([{"role": "user", "content": "a"}], None, "row 1", "messages", ())
    for around in ("<s> $A", "<s> $A </s>"):
        first, _ = tokenizer(around, TEMPLATE).documents([chat, chat])
        assert tokenizer().inner.decode(first.tolist()) == "<user>a</s>", "the BOS is added where it is packed"


def test_a_tokenizer_that_gives_other_tokens_beside_special_ones(tokenizer: MakeTokenizer) -> None:
    found = tokenizer("<s> $A </s>")
    inner = found.inner

    class Odd:
        all_special_ids, eos_token_id = [BOS, EOS], EOS

        def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> object:
            return inner(text * 2 if add_special_tokens else "", add_special_tokens=add_special_tokens)

    odd = type(found)(Odd(), "MODEL")
    assert (odd.beginning, odd.ending) == ((BOS,), (EOS,))
