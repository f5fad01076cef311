"""Tokenizers of every kind that GGUF holds, trained here on a page of text, and a writer of tokenizer.model files."""

import json
import struct
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = (
    "The quick brown fox jumps over the lazy dog. Don't you think it's 2024, or 1,234.56 euros? HELLO World; "
    "helloWorld façade naïve Straße мир и война 日本語のテキスト 中文字符 🙂 "
    "def f(x):\n    return x ** 2  # comment\n\n\tclass A:\n        pass\n\n"
    "int main() { return 0; }\r\n we're they'll I've WE'RE x=1;y=22;z=333 4444 55555 //path/to/file\n"
) * 3
SPECIAL = ("<s>", "</s>", "<pad>")
CONTRACTIONS, REST = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + REST
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + REST
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL = {
    "gpt-2": (None, False),
    "smollm": ("digits", False),
    "llama-bpe": (LLAMA3, True),
    "smaug-bpe": (LLAMA3, False),
    "qwen2": (QWEN2, False),
    "tekken": (TEKKEN, True),
    "gpt-4o": (GPT4O, False),
}
"""llama.cpp's names, and what is cut with; whether whole words are taken as they are."""


def byte_level(folder: Path, name: str, size: int = 512, bos: bool = False) -> None:
    """A byte-level BPE of this many tokens, its pre-tokenizer the one that llama.cpp calls by this name."""
    expression, whole = BYTE_LEVEL[name]
    found = Tokenizer(models.BPE(ignore_merges=whole))
    own = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=expression in (None, "digits"))
    if expression is None:
        found.pre_tokenizer = own
    elif expression == "digits":
        found.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), own])
    else:
        found.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), "isolated"), own])
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=alphabet)
    found.train_from_iterator([TEXT], trainer)
    if bos:
        found.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    save(folder, found)


def byte_fallback(folder: Path, size: int = 600, prefix: bool = True, pieces: bool = False) -> dict[str, float]:
    """A BPE as SentencePiece makes it; ``pieces`` adds the tokenizer.model. Its tokens and scores."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=size - 259, special_tokens=[]))
    merged = [token for token, _ in sorted(trained.get_vocab().items(), key=lambda pair: pair[1])]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *(t for t in merged if len(t) > 1)]
    tokens += [token for token in merged if len(token) == 1]  # letters last, as SentencePiece has them
    vocabulary = {token: n for n, token in enumerate(tokens)}
    merges = [
        (token[:at], token[at:])
        for token in tokens[259:]
        for at in range(1, len(token))
        if token[:at] in vocabulary and token[at:] in vocabulary
    ]
    found = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    found.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    found.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    found.add_special_tokens(["<unk>", "<s>", "</s>"])
    found.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    save(folder, found)
    scores = {token: 0.0 if n < 259 else -float(n - 259) for n, token in enumerate(tokens)}
    if pieces:
        (folder / "tokenizer.model").write_bytes(sentencepiece(scores, prefix))
    return scores


def save(folder: Path, tokenizer: Tokenizer, **settings: Any) -> None:
    """tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "TokenizersBackend"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | settings))


def sentencepiece(scores: dict[str, float], prefix: bool = True, kind: int = 2) -> bytes:
    """A tokenizer.model with these pieces: a message of protocol buffers, written by hand."""
    types = {"<unk>": 2, "<s>": 3, "</s>": 3}
    found = b""
    for token, score in scores.items():
        type_ = types.get(token, 6 if len(token) == 6 and token.startswith("<0x") else 1)
        found += field(1, field(1, token.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([type_]))
    return found + field(2, b"\x18" + bytes([kind])) + field(3, b"\x18" + bytes([prefix]) + b"\x20\x00")


def field(number: int, value: bytes) -> bytes:
    """A field of bytes."""
    length, size = len(value), b""
    while length >= 128:
        size, length = size + bytes([length % 128 + 128]), length // 128
    return bytes([number << 3 | 2]) + size + bytes([length]) + value
