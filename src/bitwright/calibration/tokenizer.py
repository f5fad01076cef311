"""A tokenizer as a model was trained with it: what stands in front of every text, and between two."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import takewhile
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from bitwright.calibration.chat import ends_with, rendered
from bitwright.calibration.rows import MOST_BYTES, Chat, Document
from bitwright.calibration.tokens import PIECE, tokens_of
from bitwright.core.errors import CalibrationError

PROBES = ("a", "Hello.", "1")
"""Texts that show which tokens stand around a text."""
BETWEEN = "\n\n"
"""The text between two documents if a tokenizer has no token for it."""
AT_ONCE = 2**18
"""The number of characters that are tokenized at once, of documents that are short."""


class Tokenizer:
    """A tokenizer of transformers, asked for the tokens that it puts around a text.

    ``beginning`` are those in front of every text, such as ``<bos>``; ``ending`` are those behind it. Both are asked of
    the tokenizer, because names in its config say little: many name a ``bos_token`` that they never use.
    """

    def __init__(self, tokenizer: Any, folder: object) -> None:
        """Ask a loaded tokenizer; ``folder`` is named in errors."""
        self.inner, self.folder = tokenizer, folder
        self.beginning, self.ending = self._around()

    @property
    def begins_with(self) -> str | None:
        """The tokens in front of every text, spelled out; None if there are none."""
        return "".join(map(str, self.inner.convert_ids_to_tokens(list(self.beginning)))) or None

    def stream(self, text: str) -> Int[Tensor, " M"]:
        """The tokens of a whole text as one sequence, with those that the tokenizer puts around it, once."""
        return tokens_of(text, lambda piece: self._encode(piece, around=True))

    def documents(self, documents: Iterable[Document]) -> list[Int[Tensor, " _"]]:
        """The tokens of each document, without those of ``beginning``, with those that end it if others follow.

        Chats are rendered. Documents without tokens are left out. Raises CalibrationError.
        """
        contents = [tokens for tokens in self._contents(documents) if len(tokens)]
        end = self._separator if len(contents) > 1 else torch.tensor(self.ending, dtype=torch.int64)
        return [torch.cat([tokens, end]) if self._is_open(tokens) else tokens for tokens in contents]

    def _is_open(self, tokens: Int[Tensor, " M"]) -> bool:
        """Whether a document does not end by itself, as a rendered chat may."""
        return not ends_with(tokens[-3:].tolist(), self.inner.eos_token_id)

    @cached_property
    def _separator(self) -> Int[Tensor, " _"]:
        """What stands behind each of several documents."""
        ending: Sequence[int] = self.ending
        if not ending and not self.beginning:
            end = self.inner.eos_token_id
            ending = self._encode(BETWEEN) if end is None else [end]
        return torch.tensor(ending, dtype=torch.int64)

    def _contents(self, documents: Iterable[Document]) -> Iterator[Int[Tensor, " _"]]:
        """Tokenize the documents, some at once. Raises CalibrationError for chats that are too long once rendered."""
        texts, length, total = list[str](), 0, 0
        for document in documents:
            text = rendered(document, self.inner, self.folder) if isinstance(document, Chat) else document
            texts.append(text)
            length, total = length + len(text), total + (len(text) if isinstance(document, Chat) else 0)
            if total > MOST_BYTES:
                raise CalibrationError(
                    f"the chat template in {self.folder} makes more than {MOST_BYTES:,} characters of the chats; take "
                    "fewer rows"
                )
            if length > AT_ONCE:
                yield from self._tokenized(texts)
                texts, length = [], 0
        yield from self._tokenized(texts)

    def _tokenized(self, texts: list[str]) -> Iterator[Int[Tensor, " _"]]:
        """The tokens of texts; short ones are tokenized together, which takes a tenth of the time."""
        short = [text for text in texts if 0 < len(text) <= PIECE]
        together = iter(self.inner(short, add_special_tokens=False, verbose=False).input_ids if short else ())
        for text in texts:
            if not text:
                continue
            tokens = tokens_of(text, self._encode) if len(text) > PIECE else torch.tensor(next(together))
            yield self._without_beginning(tokens.to(torch.int64))

    def _without_beginning(self, tokens: Int[Tensor, " M"]) -> Int[Tensor, " _"]:
        """The tokens without a beginning that the text, or a chat template, has already."""
        count = len(self.beginning)
        return tokens[count:] if count and tuple(tokens[:count].tolist()) == self.beginning else tokens

    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The tokens that the tokenizer puts in front of a text, and behind it."""
        for probe in PROBES:
            inside, whole = self._encode(probe), self._encode(probe, around=True)
            for start in range(len(whole) - len(inside) + 1):
                if inside and whole[start : start + len(inside)] == inside:
                    return tuple(whole[:start]), tuple(whole[start + len(inside) :])
        whole, special = self._encode(PROBES[0], around=True), set(self.inner.all_special_ids)
        leading = tuple(takewhile(special.__contains__, whole))
        return leading, tuple(takewhile(special.__contains__, reversed(whole[len(leading) :])))[::-1]

    def _encode(self, text: str, around: bool = False) -> list[int]:
        return list(self.inner(text, add_special_tokens=around, verbose=False).input_ids)
