"""The tokenizer of a model as GGUF's metadata: tokens, beginning and end of a text, chat templates."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitwright.checkpoint.sidecar_files import (
    TOKENIZER,
    TOKENIZER_CONFIG,
    read_template,
    read_tokenizer,
    read_tokenizer_config,
)
from bitwright.core.errors import CheckpointError, RecipeError
from bitwright.core.small_files import read_small
from bitwright.formats.gguf.file import Entry, count, flag, integers, numbers, text, texts
from bitwright.formats.gguf.sentencepiece import parse
from bitwright.formats.gguf.vocabulary import BASE, Vocabulary, from_json, from_model

PIECES = "tokenizer.model"
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator", "mask": "mask"}
"""The kinds of special tokens, and GGUF's names of them (in its own spelling)."""


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer with as many tokens as the embedding has rows."""

    vocabulary: Vocabulary
    rows: int
    special: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    template: str | None
    named_templates: Mapping[str, str]

    def entries(self) -> Iterator[Entry]:
        """Yield the metadata."""
        vocabulary, at = self.vocabulary, "tokenizer.ggml"
        tokens, types, scores = vocabulary.filled(self.rows)
        yield text(f"{at}.model", vocabulary.model)
        yield text(f"{at}.pre", vocabulary.pre or "default")
        yield texts(f"{at}.tokens", tokens)
        yield integers(f"{at}.token_type", types)
        if vocabulary.scores is not None:
            yield numbers(f"{at}.scores", scores)
        if vocabulary.merges is not None:
            yield texts(f"{at}.merges", vocabulary.merges)
        for kind, token in self.special.items():
            yield count(f"{at}.{SPECIAL[kind]}_token_id", token)
        yield flag(f"{at}.add_bos_token", self.add_bos)
        yield flag(f"{at}.add_eos_token", self.add_eos)
        if vocabulary.space_prefix is not None:
            yield flag(f"{at}.add_space_prefix", vocabulary.space_prefix)
        yield from self._templates()

    def _templates(self) -> Iterator[Entry]:
        for name, template in sorted(self.named_templates.items()):
            yield text(f"tokenizer.chat_template.{name}", template)
        if self.named_templates:
            yield texts("tokenizer.chat_templates", sorted(self.named_templates))
        if self.template:
            yield text("tokenizer.chat_template", self.template)


def tokenizer(folder: Path, config: Mapping[str, Any], rows: int) -> Tokenizer:
    """Read the tokenizer in a model's folder, for an embedding with so many rows.

    Raises RecipeError for what GGUF cannot express, CheckpointError for files that cannot be read.
    """
    described, settings = read_tokenizer(folder), read_tokenizer_config(folder)
    vocabulary = _vocabulary(folder, described)
    for token, added in (settings.get("added_tokens_decoder") or {}).items():
        if int(token) not in vocabulary.tokens:
            vocabulary.add(int(token), added["content"], bool(added.get("special")))
    special = dict(_special(vocabulary, settings, config))
    if "eos" not in special:
        raise RecipeError(
            f"{folder}: names no token that ends a text (eos_token in {TOKENIZER_CONFIG}, eos_token_id in "
            f"config.json), and llama.cpp always has one; {BASE}"
        )
    begins, ends = _template_adds(folder, described, vocabulary, special)
    vocabulary.filled(rows)  # refused now if it does not fit
    default, named = _chat(folder, settings)
    return Tokenizer(
        vocabulary,
        rows,
        special,
        add_bos=_setting(settings, "add_bos_token", vocabulary.model == "llama" if begins is None else begins),
        add_eos=_setting(settings, "add_eos_token", bool(ends)),
        template=default,
        named_templates=named,
    )


def _setting(settings: Mapping[str, Any], key: str, otherwise: bool) -> bool:
    value = settings.get(key)
    return otherwise if value is None else bool(value)


def _vocabulary(folder: Path, described: Mapping[str, Any]) -> Vocabulary:
    file = folder / PIECES
    if not described:
        if not file.exists():
            raise RecipeError(
                f"{folder}: has neither {TOKENIZER} nor {PIECES}, and a GGUF file has a tokenizer; {BASE}"
            )
        return from_model(file)
    try:
        by_pieces = bool(described["model"].get("byte_fallback")) and file.exists()
        return from_json(described, parse(read_small(file), str(file)) if by_pieces else None)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{folder / TOKENIZER}: is not what tokenizers writes ({error!r})") from None


def _special(
    vocabulary: Vocabulary, settings: Mapping[str, Any], config: Mapping[str, Any]
) -> Iterator[tuple[str, int]]:
    """Yield the ids of special tokens: as the tokenizer names them, or else as config.json numbers them."""
    by_text = {content: token for token, content in vocabulary.tokens.items()}
    for kind in SPECIAL:
        named, numbered = settings.get(f"{kind}_token"), config.get(f"{kind}_token_id")
        content = named.get("content") if isinstance(named, dict) else named
        numbered = numbered[0] if isinstance(numbered, list) and numbered else numbered
        token = by_text.get(content, numbered) if content is not None else numbered
        if isinstance(token, int) and token in vocabulary.tokens:
            yield kind, token


def _template_adds(
    folder: Path, described: Mapping[str, Any], vocabulary: Vocabulary, special: Mapping[str, int]
) -> tuple[bool | None, bool | None]:
    """Whether a text gets the tokens that begin and end it; None if tokenizer.json does not say."""
    after = described.get("post_processor") or {}
    steps = after.get("processors") or [after]
    template = next((step for step in steps if step.get("type") == "TemplateProcessing"), None)
    if template is None:
        return (False, False) if described and vocabulary.model == "gpt2" else (None, None)
    added = [step["SpecialToken"]["id"] if step.get("SpecialToken") else None for step in template.get("single") or ()]
    if None not in added:
        raise CheckpointError(
            f"{folder / TOKENIZER}: post_processor.single has no place for the text itself; copy it from the original "
            "repository again"
        )
    where = added.index(None)
    wanted = [vocabulary.tokens.get(special[kind]) if kind in special else None for kind in ("bos", "eos")]
    if added[:where] not in ([], [wanted[0]]) or added[where + 1 :] not in ([], [wanted[1]]):
        raise RecipeError(f"a text gets the tokens {added} around it; llama.cpp adds bos and eos, {wanted}; {BASE}")
    return bool(added[:where]), bool(added[where + 1 :])


def _chat(folder: Path, settings: Mapping[str, Any]) -> tuple[str | None, dict[str, str]]:
    """The chat template, and others by name."""
    stated = settings.get("chat_template")
    named = {}
    if isinstance(stated, list):
        named = {str(template["name"]): str(template["template"]) for template in stated}
    default = read_template(folder)
    if default is None:
        default = named.pop("default", None)
    return (stated if isinstance(stated, str) and default is None else default), named
