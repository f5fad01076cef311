"""Recognize ordinary config files, which can be read without importing transformers; that takes seconds.

A config.json is plain if each of its keys is known, transformers accepts each value without a warning, and the sizes
fit each other. Then the decoder that it describes is the one that transformers would build.
"""

from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any

from bitwright.core.block import Architecture
from bitwright.core.decoder import Config, Decoder
from bitwright.core.errors import CheckpointError

SCALINGS = {
    "default": set[str](),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}
"""The numbers that belong to each kind of scaling of rotary positions."""


def plain_decoder(config: Config, architecture: Architecture) -> Decoder | None:
    """Read the decoder of a plain config.json; None if it is not plain, so that transformers has to read it."""
    if architecture.decoder is None or not all(key in _USUAL and _USUAL[key](value) for key, value in config.items()):
        return None
    try:
        decoder = architecture.decoder(config)
    except CheckpointError:
        return None
    fits = decoder.hidden % decoder.heads == 0 and decoder.heads % decoder.kv_heads == 0
    fits = fits and (config.get("pad_token_id") or 0) < decoder.vocabulary
    return decoder if fits and {"max_position_embeddings", "tie_word_embeddings"} <= config.keys() else None


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_count_or_none(value: Any) -> bool:
    return value is None or _is_count(value)


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number, 0 or more."""
    return type(value) in (int, float) and isfinite(value) and value >= 0


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_token(value: Any) -> bool:
    return value is None or (type(value) is int and value >= 0)


def _is_tokens(value: Any) -> bool:
    """Whether a value is the number of a token, a list of such numbers, or None."""
    return all(type(token) is int and token >= 0 for token in value) if isinstance(value, list) else _is_token(value)


def _is_dtype(value: Any) -> bool:
    return value in ("float32", "float16", "bfloat16")


def _is_causal(value: Any) -> bool:
    """Whether a value names a single class, a causal language model."""
    return isinstance(value, list) and len(value) == 1 and _is_text(value[0]) and value[0].endswith("ForCausalLM")


def _is_rope(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return value is None
    kind = value.get("rope_type", value.get("type", "default"))
    numbers = {key: number for key, number in value.items() if key not in ("rope_type", "type")}
    known = isinstance(kind, str) and kind in SCALINGS and numbers.keys() - {"rope_theta"} == SCALINGS[kind]
    return known and all(_is_number(number) and number > 0 for number in numbers.values())


_USUAL: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"), _is_count),
    **dict.fromkeys(("num_attention_heads", "max_position_embeddings", "pretraining_tp"), _is_count),
    **dict.fromkeys(("head_dim", "num_key_value_heads"), _is_count_or_none),
    **dict.fromkeys(("attention_dropout", "initializer_range", "rms_norm_eps", "rope_theta"), _is_number),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), _is_rope),
    **dict.fromkeys(("bos_token_id", "eos_token_id"), _is_tokens),
    **dict.fromkeys(("dtype", "torch_dtype"), _is_dtype),
    **dict.fromkeys(("tie_word_embeddings", "use_cache", "attention_bias", "mlp_bias"), _is_flag),
    **dict.fromkeys(("_name_or_path", "transformers_version", "model_type"), _is_text),
    "architectures": _is_causal,
    "hidden_act": lambda value: value == "silu",
    "pad_token_id": _is_token,
}
"""The keys of a plain config.json, each with the check of its values."""
