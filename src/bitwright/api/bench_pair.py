"""Whether two models that bench measures side by side are one: the same architecture, the same dimensions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitwright.api.completeness import apart
from bitwright.api.source import open_checkpoint
from bitwright.core.errors import CheckpointError
from bitwright.core.registry import find

GGUF_KEYS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
}
"""Dimensions by the names that config.json has for them, and GGUF's."""


def require_same_folders(model: Path, against: Path) -> None:
    """Raises CheckpointError where two folders have another architecture, or other dimensions."""
    _require_same(model, against, open_checkpoint(model).config, open_checkpoint(against).config)


def require_same_in_files(model: Path, against: Path) -> None:
    """The same of a .gguf file, and of another or an unquantized folder. Raises RecipeError for a folder that GGUF has
    no words for, CheckpointError for a damaged file."""
    theirs = _of_folder(against) if against.is_dir() else _of_file(against)
    _require_same(model, against, _of_file(model), theirs)


def _require_same(model: Path, against: Path, here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    if found := apart(here, there):
        raise CheckpointError(
            f"--against {against} is another model than {model}: {found}. Name the original that it was made of, or "
            "leave --against out"
        )


def _of_folder(folder: Path) -> dict[str, Any]:
    """What config.json says, the architecture as GGUF calls it."""
    config = open_checkpoint(folder).config
    return {**config, "model_type": find("formats", "gguf").architecture(config).name}


def _of_file(path: Path) -> dict[str, Any]:
    """What a .gguf file says, by config.json's names; the vocabulary is as many tokens as it lists."""
    says = find("formats", "gguf").opened(path).header.says
    named = says.get("general.architecture")
    found = {key: says.get(f"{named}.{theirs}") for key, theirs in GGUF_KEYS.items()}
    tokens = getattr(says.get("tokenizer.ggml.tokens"), "count", None)
    return {**found, "model_type": named, "vocab_size": tokens}
