"""A tokenizer's tokens as GGUF lists them: byte-level BPE and SentencePiece's BPE.

``gpt2`` is byte-level BPE: tokens and merges. ``llama`` is SentencePiece: tokens, and scores that tell what is merged
first. A tokenizer.json lists SentencePiece's merges in order instead; a token's score is then its place, negative.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitwright.core.errors import CheckpointError, RecipeError
from bitwright.core.small_files import read_small
from bitwright.formats.gguf.pretokenizers import of_bytes, pre_tokenizer
from bitwright.formats.gguf.sentencepiece import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    SentencePieces,
    parse,
)

SPACE = "▁"
NEVER_MERGED = -1e6
NO_MERGES = "[no merges]"
"""The merges of a tokenizer that has none, two words that no bytes become: a list in GGUF is not empty."""
BASE = "--base with a GGUF file that llama.cpp's own converter made takes the tokenizer from there"
_NO_SCORES = f"its merges are none that SentencePiece's scores could say, and llama.cpp goes by those; {BASE}"


@dataclass
class Vocabulary:
    """Tokens by id, each with a type; for ``llama`` scores, for ``gpt2`` merges and the pre-tokenizer's name."""

    model: str
    tokens: dict[int, str]
    types: dict[int, int]
    scores: dict[int, float] | None = None
    merges: list[str] | None = None
    pre: str | None = None
    space_prefix: bool | None = None

    def add(self, token: int, content: str, special: bool) -> None:
        """Add a token that is looked for in a text before anything is merged."""
        if self.types.get(token) != UNKNOWN:
            self.types[token] = CONTROL if special else USER_DEFINED
        self.tokens[token] = _as_in_text(content, self.types[token]) if self.model == "llama" else content

    def filled(self, rows: int) -> tuple[list[str], list[int], list[float]]:
        """Tokens, types and scores for every row of the embedding; ids without a token are unused.

        Raises CheckpointError for no tokens, RecipeError for more than rows, and for two that are alike.
        """
        if not self.tokens:
            raise CheckpointError("the tokenizer has no token; copy it from the original repository again")
        if max(self.tokens) >= rows:
            raise RecipeError(
                f"the tokenizer's token {self.tokens[max(self.tokens)]!r} has id {max(self.tokens)}, the embedding "
                f"{rows} rows (vocab_size); they belong to different models, or a token was added without a row"
            )
        names, taken = [], set(self.tokens.values())
        if len(taken) < len(self.tokens):
            twice = next(text for text in taken if list(self.tokens.values()).count(text) > 1)
            raise RecipeError(f"two tokens are called {twice!r}, and GGUF tells tokens apart by their text; {BASE}")
        for n in range(rows):
            name = self.tokens.get(n, f"[PAD{n}]")
            names.append(name if n in self.tokens or name not in taken else f"[PAD{n}_]")
        scores = self.scores or {}
        return (
            names,
            [self.types.get(n, UNUSED) for n in range(rows)],
            [scores.get(n, NEVER_MERGED) for n in range(rows)],
        )


def from_json(tokenizer: Mapping[str, Any], pieces: SentencePieces | None) -> Vocabulary:
    """Read the vocabulary of a tokenizer.json; ``pieces`` of a tokenizer.model beside it have the scores."""
    model = tokenizer["model"]
    if model.get("type", "BPE") != "BPE":
        raise RecipeError(
            f"GGUF holds byte-level BPE and SentencePiece's BPE; tokenizer.json is {model['type']}; {BASE}"
        )
    refused = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    if refused:
        raise RecipeError(f"llama.cpp has no BPE with {', '.join(refused)}, which tokenizer.json asks for; {BASE}")
    vocabulary = _sentencepiece(tokenizer, pieces) if model.get("byte_fallback") else _byte_level(tokenizer)
    for token in tokenizer.get("added_tokens") or ():
        vocabulary.add(int(token["id"]), token["content"], bool(token.get("special")))
    return vocabulary


def from_model(file: Path) -> Vocabulary:
    """Read the vocabulary of a tokenizer.model. Raises CheckpointError for a damaged one, RecipeError for no BPE."""
    return _from_pieces(parse(read_small(file), str(file)))


def _byte_level(tokenizer: Mapping[str, Any]) -> Vocabulary:
    model, normalizer = tokenizer["model"], tokenizer.get("normalizer")
    if normalizer and normalizer.get("type") != "NFC":  # Qwen's; llama.cpp takes text as it comes
        raise RecipeError(f"llama.cpp normalizes no text, tokenizer.json does: {normalizer.get('type')}; {BASE}")
    tokens = {int(n): text for text, n in model["vocab"].items()}
    merges = [pair for pair, _ in _merges(model)]
    types = dict.fromkeys(tokens, NORMAL)
    if merges:
        return Vocabulary("gpt2", tokens, types, merges=merges, pre=pre_tokenizer(tokenizer))
    return Vocabulary("gpt2", tokens, types, merges=[NO_MERGES], pre=of_bytes(tokenizer))


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges as GGUF writes them, each with the token that it makes."""
    pairs = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    spaced = next((pair for pair in pairs if any(" " in half for half in pair)), None)
    if spaced is not None:
        raise RecipeError(f"tokenizer.json merges {spaced}, and GGUF has no words for a space within a merge; {BASE}")
    known = model["vocab"].keys()
    for pair in pairs:
        missing = next((piece for piece in (*pair, "".join(pair)) if piece not in known), None)
        if missing is not None:
            raise CheckpointError(
                f"tokenizer.json merges {pair}, and has no token {missing!r}: the tokenizers library does not load it, "
                "and llama.cpp would spell such words in bytes; copy it from the original repository again"
            )
    return [(" ".join(pair), "".join(pair)) for pair in pairs]


def _sentencepiece(tokenizer: Mapping[str, Any], pieces: SentencePieces | None) -> Vocabulary:
    """The vocabulary of a BPE that falls back to bytes."""
    model, prefix = tokenizer["model"], _space_prefix(tokenizer)
    tokens = {int(n): text for text, n in model["vocab"].items()}
    if pieces is not None and all(tokens.get(n) == piece.text for n, piece in enumerate(pieces.pieces)):
        vocabulary = _from_pieces(pieces)
        vocabulary.space_prefix = prefix
        new = {n: text for n, text in tokens.items() if n not in vocabulary.tokens}
        vocabulary.tokens |= new
        vocabulary.types |= dict.fromkeys(new, NORMAL)
        return vocabulary
    merges = _merges(model)
    order = _order([token for _, token in merges], {pair for pair, _ in merges}, set(tokens.values()))
    scores = {n: order.get(text, NEVER_MERGED) for n, text in tokens.items()}
    types = {n: BYTE if _is_byte(text) else NORMAL for n, text in tokens.items()}
    unknown = model.get("unk_token")
    types |= {n: UNKNOWN for n, text in tokens.items() if text == unknown}
    return Vocabulary("llama", tokens, types, scores=scores, space_prefix=prefix)


def _order(merged: list[str], merges: set[str], tokens: set[str]) -> dict[str, float]:
    """The scores of the tokens that merging makes, by the order of the merges.

    llama.cpp merges whatever two tokens make a third, by the third's score. Raises RecipeError for merges that scores
    cannot express: one of two pairs that make the same token comes later, or never.
    """
    order: dict[str, float] = {}
    for n, token in enumerate(merged):
        if token in order and merged[n - 1] != token:
            raise RecipeError(f"tokenizer.json merges {token!r} of two pairs with others in between; {_NO_SCORES}")
        order.setdefault(token, -float(n))
    for token in order:
        for at in range(1, len(token)):
            pair = (token[:at], token[at:])
            if pair[0] in tokens and pair[1] in tokens and " ".join(pair) not in merges:
                raise RecipeError(f"tokenizer.json never merges {pair}, though {token!r} is a token; {_NO_SCORES}")
    return order


def _from_pieces(model: SentencePieces) -> Vocabulary:
    if model.kind != BPE:
        raise RecipeError(f"tokenizer.model is no BPE but SentencePiece's kind {model.kind}; {BASE}")
    if model.remove_extra_spaces:
        raise RecipeError(f"tokenizer.model drops repeated spaces, which llama.cpp does not; {BASE}")
    tokens = {n: _as_in_text(piece.text, piece.type) for n, piece in enumerate(model.pieces)}
    types = {n: piece.type for n, piece in enumerate(model.pieces)}
    scores = {n: piece.score for n, piece in enumerate(model.pieces)}
    return Vocabulary("llama", tokens, types, scores=scores, space_prefix=model.dummy_prefix)


def _as_in_text(text: str, type: int) -> str:
    """Write a token as it appears in a text.

    llama.cpp searches the text for tokens that a user added, so these have ordinary spaces, not SentencePiece's sign.
    """
    return text.replace(SPACE, " ") if type == USER_DEFINED else text


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _space_prefix(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a text is tokenized as if a space stood before it. Raises RecipeError for other preparations."""
    normalizer, cut = tokenizer.get("normalizer") or {}, tokenizer.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    if not cut and steps in ([replace], [prepend, replace]):
        return len(steps) == 2
    plain = cut.get("type") == "Metaspace" and cut.get("replacement") == SPACE and not cut.get("split", True)
    if plain and not steps:
        scheme = cut.get("prepend_scheme", "always" if cut.get("add_prefix_space", True) else "never")
        return bool(scheme != "never")
    raise RecipeError(
        f"tokenizer.json prepares text as no SentencePiece model does ({[s.get('type') for s in steps]}, "
        f"{cut.get('type')}), and llama.cpp has no words for it; {BASE}"
    )
