"""llama.cpp's names for what cuts text into words before byte-level BPE, the pre-tokenizer of a tokenizer.json.

llama.cpp has code of its own for each name. They are told apart by the expression that tokenizer.json cuts with, and by
whether words that are tokens are taken whole, without merging (``ignore_merges``), which llama.cpp ties to the name.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from bitwright.core.errors import RecipeError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD, _REST = r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNS, _SIGNS_AND_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_FRONT = r"[^\r\n\p{L}\p{N}]?"

_LLAMA3 = "|".join([_CONTRACTIONS, _WORD, r"\p{N}{1,3}", _SIGNS, _REST])
_QWEN2 = "|".join([_CONTRACTIONS, _WORD, r"\p{N}", _SIGNS, _REST])
_TEKKEN = "|".join(
    [f"{_FRONT}{_UPPER}*{_LOWER}+", f"{_FRONT}{_UPPER}+{_LOWER}*", r"\p{N}", _SIGNS_AND_SLASH, _REST]
)  # fmt: skip
_GPT4O = "|".join(
    [
        f"{_FRONT}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?",
        f"{_FRONT}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?",
        r"\p{N}{1,3}",
        _SIGNS_AND_SLASH,
        _REST,
    ]
)
_GPT2, _DIGITS = "the one of GPT-2", "single digits, then the one of GPT-2"

NAMES = {
    (_GPT2, False): "gpt-2",
    (_DIGITS, False): "smollm",
    (_LLAMA3, True): "llama-bpe",
    (_LLAMA3, False): "smaug-bpe",
    (_QWEN2, False): "qwen2",
    (_TEKKEN, True): "tekken",
    (_GPT4O, False): "gpt-4o",
}


def pre_tokenizer(tokenizer: Mapping[str, Any]) -> str:
    """Find llama.cpp's name for the pre-tokenizer of a tokenizer.json with a byte-level BPE model.

    Raises RecipeError if it has none.
    """
    steps, whole = _steps(tokenizer.get("pre_tokenizer")), bool(tokenizer["model"].get("ignore_merges", False))
    name = NAMES.get((_expression(steps), whole))
    if name is None:
        raise RecipeError(
            f"llama.cpp knows no pre-tokenizer that cuts as tokenizer.json does, with {_shown(steps)}"
            f"{' and whole words taken as they are' if whole else ''}; known here are {', '.join(NAMES.values())}. "
            "Where llama.cpp's own converter knows this model: --base with a GGUF file that it made takes the "
            "tokenizer from there"
        )
    return name


def of_bytes(tokenizer: Mapping[str, Any]) -> str:
    """Find a name for a model that merges nothing, so that it does not matter where text is cut."""
    last = (_steps(tokenizer.get("pre_tokenizer")) or [{}])[-1]
    plain = last.get("type") == "ByteLevel" and not last.get("add_prefix_space", True)
    return NAMES[_GPT2, False] if plain else pre_tokenizer(tokenizer)


def _steps(cut: Any) -> list[Mapping[str, Any]]:
    """The steps of a pre-tokenizer, those of sequences one after the other."""
    if not cut:
        return []
    nested: Sequence[Any] = cut["pretokenizers"] if cut.get("type") == "Sequence" else [cut]
    return [step for part in nested for step in (_steps(part) if part.get("type") == "Sequence" else [part])]


def _expression(steps: list[Mapping[str, Any]]) -> str:
    """The expression that text is cut with; empty if none of the names does so."""
    *cuts, last = steps or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True):
        return ""
    with_own = bool(last.get("use_regex", True))
    if not cuts:
        return _GPT2 if with_own else ""
    (cut, *more) = cuts
    if cut.get("type") == "Digits":
        return _DIGITS if with_own and cut.get("individual_digits") and not more else ""
    plain = cut.get("type") == "Split" and cut.get("behavior") in ("Isolated", "Removed") and not more
    if not plain or with_own or bool(cut.get("invert")) != (cut["behavior"] == "Removed"):
        return ""
    pattern = cut["pattern"].get("Regex", "")
    return str(pattern).replace("\r", r"\r").replace("\n", r"\n")


def _shown(steps: list[Mapping[str, Any]]) -> str:
    return ", ".join(f"{step.get('type')} {step.get('pattern', '')}".strip() for step in steps) or "nothing"
