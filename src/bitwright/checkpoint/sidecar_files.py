"""Read the files beside a model's weights, as far as formats use them, with every value of the type that they take."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitwright.checkpoint.layout import read_bytes
from bitwright.core.errors import CheckpointError
from bitwright.core.json_shape import FLAG, NUMBER, TEXT, WHOLE, Either, Items, Keys, Shape, require_shape
from bitwright.core.small_files import parse_object

TOKENIZER, TOKENIZER_CONFIG, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
TEMPLATE = "chat_template.jinja"
AGAIN = "copy it from the original repository again"
COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates/*",
    "generation_config.json",
    "*processor_config.json",
    "image_processor*",
    "feature_extractor*",
    "LICENSE*",
    "USE_POLICY*",
    "NOTICE*",
)
"""The sidecar files that are copied, as file name patterns."""

_ADDED = Keys({"id": WHOLE, "content": TEXT, "special": FLAG}, needs=("id", "content"))
_SPECIAL = Either((TEXT, Keys({"content": TEXT}, needs=("content",))))
_STEP_KEYS: dict[str, Shape] = {
    **dict.fromkeys(("type", "content", "prepend", "replacement", "prepend_scheme", "behavior"), TEXT),
    **dict.fromkeys(("add_prefix_space", "use_regex", "individual_digits", "invert", "split"), FLAG),
    "pattern": Keys({"String": TEXT, "Regex": TEXT}),
    "single": Items(Keys(others=Keys({"id": TEXT}, needs=("id",)))),
}
_STEP = Keys(_STEP_KEYS)
_STEP_KEYS |= dict.fromkeys(("normalizers", "pretokenizers", "processors", "decoders"), Items(_STEP))
_VOCABULARY = Either((Keys(others=WHOLE), Items(Items(Either((TEXT, NUMBER)), 2))))
_MODEL = Keys(
    {
        **dict.fromkeys(("type", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"), TEXT),
        **dict.fromkeys(("byte_fallback", "ignore_merges"), FLAG),
        "dropout": NUMBER,
        "vocab": _VOCABULARY,
        "merges": Items(Either((TEXT, Items(TEXT, 2)))),
    },
    needs=("vocab",),
)
_STEPS = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"), _STEP)
_TOKENIZER = Keys({"model": _MODEL, "added_tokens": Items(_ADDED), **_STEPS}, needs=("model",))
_TOKENIZER_CONFIG = Keys(
    {
        "added_tokens_decoder": Keys(others=Keys({"content": TEXT, "special": FLAG}, needs=("content",))),
        "chat_template": Either((TEXT, Items(Keys({"name": TEXT, "template": TEXT}, needs=("name", "template"))))),
        "model_max_length": NUMBER,
        **dict.fromkeys(("add_bos_token", "add_eos_token"), FLAG),
        **{f"{kind}_token": _SPECIAL for kind in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")},
    }
)
_TOKENS = Either((WHOLE, Items(WHOLE)))
_NUMBERED = {f"{kind}_token_id": _TOKENS for kind in ("bos", "eos", "pad")}
_GENERATION = Keys(
    {
        **_NUMBERED,
        **dict.fromkeys(
            ("temperature", "top_p", "presence_penalty", "frequency_penalty", "repetition_penalty"), NUMBER
        ),
    }
)


def read_tokenizer(folder: Path) -> dict[str, Any]:
    """Read tokenizer.json; empty if there is none. Raises CheckpointError."""
    return _read(folder / TOKENIZER, _TOKENIZER, f"that is not what tokenizers writes, {AGAIN}")


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """Read tokenizer_config.json; empty if there is none. Raises CheckpointError."""
    settings = _read(folder / TOKENIZER_CONFIG, _TOKENIZER_CONFIG)
    odd = next((key for key in settings.get("added_tokens_decoder") or () if not _is_number(key)), None)
    if odd is not None:
        raise CheckpointError(
            f"{folder / TOKENIZER_CONFIG}: added_tokens_decoder has the key {odd!r:.60}, and the number of a token was "
            f"expected; {AGAIN}"
        )
    return settings


def read_generation_config(folder: Path) -> dict[str, Any]:
    """Read generation_config.json; empty if there is none. Raises CheckpointError."""
    return _read(folder / GENERATION, _GENERATION)


def require_token_numbers(config: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError for a config.json whose special tokens are no numbers of tokens."""
    require_shape(dict(config), Keys(_NUMBERED), where, AGAIN)


def read_template(folder: Path) -> str | None:
    """Read the chat template that is a file of its own; None if there is none. Raises CheckpointError."""
    path = folder / TEMPLATE
    if not path.is_file():
        return None
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}; {AGAIN}") from None


def _read(path: Path, shape: Shape, mend: str = AGAIN) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = parse_object(read_bytes(path), str(path))
    require_shape(content, shape, str(path), mend)
    return content


def _is_number(key: str) -> bool:
    return key.isascii() and key.isdecimal() and len(key) < 10
