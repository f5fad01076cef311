"""Settings in mlc-chat-config.json with which MLC-LLM cannot compute, or computes no numbers."""

from collections.abc import Iterator, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from bitwright.core.errors import shown

SIZES = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers"),
    *("head_dim", "vocab_size", "tensor_parallel_shards", "pipeline_parallel_stages", "max_batch_size"),
)
LENGTHS = ("context_window_size", "sliding_window_size", "prefill_chunk_size")
"""Numbers of tokens, of which -1 says that there is no limit."""
SINK, ACTIVE, VOCABULARY = "attention_sink_size", "active_vocab_size", "vocab_size"
BASES = ("position_embedding_base", "rope_theta")
EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
GENERATION: Mapping[str, tuple[float, float]] = {
    "temperature": (0, 1e3), "top_p": (0, 1), "repetition_penalty": (1e-6, 1e3), "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
}  # fmt: skip
"""The lowest and the highest value of settings of generation."""
MOST = 2**31 - 1


def impossible(config: Mapping[str, Any], known: bool) -> list[str]:
    """What cannot be in the config, in words; ``known``: whether the architecture is one of those known here."""
    settings = config.get("model_config")
    if not isinstance(settings, Mapping):
        return [f"model_config is {shown(settings)}, and it is an object"]
    inner = [f"model_config.{what}" for what in (*_settings(settings), *(_known(settings) if known else ()))]
    return [*inner, *_settings(config), *_tokens(config, settings), *_chat(config)]


def _settings(stated: Mapping[str, Any]) -> Iterator[str]:
    """Numbers of the model and of how it is run, if they are stated."""
    for key, value in _deep(stated):
        name = key.rpartition(".")[2]
        if isinstance(value, float) and not isfinite(value):
            yield f"{key} is {value}, which is no number to compute with"
        elif name in SIZES and not _is_whole(value, 1):
            yield f"{key} is {shown(value)}, and it is a whole number from 1 on"
        elif (name in LENGTHS and value != -1 and not _is_whole(value, 1)) or (
            name == SINK and not _is_whole(value, -1)
        ):
            yield f"{key} is {shown(value)}, and it is a number of tokens, or -1"
        elif name in EPSILONS and not (_is_number(value) and 0 < value < 1):
            yield f"{key} is {shown(value)}, and a norm adds a number between 0 and 1"
        elif name in BASES and not (_is_number(value) and value > 0):
            yield f"{key} is {shown(value)}, and rotary frequencies are powers of a number above 0"
        elif key.startswith("rope_scaling.") and _is_number(value) and value <= 0:
            yield f"{key} is {shown(value)}, and it is more than 0"
        elif name in GENERATION and not (_is_number(value) and GENERATION[name][0] <= value <= GENERATION[name][1]):
            yield f"{key} is {shown(value)}, and it is from {GENERATION[name][0]:g} to {GENERATION[name][1]:g}"


def _known(settings: Mapping[str, Any]) -> Iterator[str]:
    """Numbers that the architectures known here do not go without."""
    heads: Any = settings.get("num_attention_heads")
    kv: Any = settings.get("num_key_value_heads")
    if _is_whole(heads, 1) and _is_whole(kv, 1) and heads % kv:
        yield f"num_key_value_heads is {kv}, which does not divide the {heads} heads of queries"
    if not {*EPSILONS} & settings.keys():
        yield f"{EPSILONS[0]} is missing"
    if settings.get(LENGTHS[0]) == -1 and settings.get(LENGTHS[1], -1) == -1:
        yield f"{LENGTHS[0]} is -1, and there is no window either"


def _tokens(config: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[str]:
    """Numbers of tokens that do not agree, and tokens that are named by a number and are not there."""
    rows = settings.get(VOCABULARY)
    if not _is_whole(rows, 1):
        return
    if config.get(VOCABULARY, rows) != rows:
        yield f"{VOCABULARY} is {shown(config[VOCABULARY])}, and the model's {rows}"
    active = config.get(ACTIVE)
    if active is not None and not (_is_whole(active, 1) and active <= rows):
        yield f"{ACTIVE} is {shown(active)}, of {rows} tokens"
    chat = config.get("conv_template")
    chat = chat if isinstance(chat, Mapping) else {}
    named = [(key, config.get(key)) for key in IDS]
    named += [(f"conv_template.{key}", chat.get(key)) for key in ("stop_token_ids", "system_prefix_token_ids")]
    for key, value in named:
        for token in value if isinstance(value, list) else [] if value is None else [value]:
            if not (_is_whole(token, -1 if key in IDS else 0) and token < rows):  # -1: there is no such token
                yield f"{key} is {shown(value)}, and there are {rows} tokens"
                break


def _chat(config: Mapping[str, Any]) -> Iterator[str]:
    """How a conversation is written, and the tokenizer's files."""
    chat = config.get("conv_template")
    if isinstance(chat, Mapping):
        if not isinstance(chat.get("roles"), Mapping) or not isinstance(chat.get("seps"), list) or not chat["seps"]:
            yield "conv_template lacks roles or seps"
    elif not (isinstance(chat, str) and chat):
        yield f"conv_template is {shown(chat)}, and it says how a conversation is written"
    names = config.get("tokenizer_files")
    if not isinstance(names, list) or not names:
        yield f"tokenizer_files is {shown(names)}, and it names the tokenizer's files"
        return
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            yield f"tokenizer_files names {shown(name)}, which lies outside of the folder"


def _deep(stated: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The values of a config that are stated, with those of the objects in it, but for the model's own."""
    for key, value in stated.items():
        if isinstance(value, Mapping):
            if key not in ("model_config", "conv_template", "tokenizer_info"):
                yield from ((f"{key}.{inner}", item) for inner, item in _deep(value))
        elif value is not None:
            yield str(key), value


def _is_whole(value: Any, least: int) -> bool:
    return type(value) is int and least <= value <= MOST


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and isfinite(value)
