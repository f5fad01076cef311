"""Metadata of a GGUF file with which llama.cpp cannot compute, or computes no numbers.

What is read here is what llama.cpp reads for every architecture, and for those that are known here all that it computes
with. A number that the file leaves out has llama.cpp's own value.
"""

from collections.abc import Iterator, Mapping
from math import isfinite
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Kind

from bitwright.core.errors import shown
from bitwright.formats.gguf.architecture import EMBEDDING, LINEAR, ROPE_FACTORS, YARN
from bitwright.formats.gguf.header import Header, Listed
from bitwright.formats.gguf.settings import NONE, TOKENS

EPSILON, BASE, CONTEXT = "attention.layer_norm_rms_epsilon", "rope.freq_base", "context_length"
EPSILONS = (EPSILON, "attention.layer_norm_epsilon", "attention.group_norm_epsilon")
HEADS, KV_HEADS, ROTATED = "attention.head_count", "attention.head_count_kv", "rope.dimension_count"
KEY, VALUE, HIDDEN = "attention.key_length", "attention.value_length", "embedding_length"
COUNTS = ("block_count", CONTEXT, HIDDEN, "feed_forward_length", HEADS, KV_HEADS, KEY, VALUE, ROTATED, "vocab_size")
"""Numbers of which a known architecture has at least 1, if the file states them."""
SCALINGS = (NONE, LINEAR, YARN, "longrope")
LISTS = ("scores", "token_type")
"""Lists with a value for each token."""
WITHOUT_TOKENS = ("none", "no_vocab")
MOST = 2**31 - 1


def impossible(header: Header, known: bool) -> list[str]:
    """What cannot be in the metadata, in words; ``known``: whether the architecture is one of those known here."""
    at, metadata = f"{header.metadata.get('general.architecture')}.", header.metadata
    stated = {key.removeprefix(at): value for key, value in metadata.items() if key.startswith(at)}
    wrong = [*_numbers(stated), *_experts(stated), *(_known(stated) if known else ())]
    return [*(f"{at}{what}" for what in wrong), *_tokens(header, stated.get("vocab_size"), at), *_factors(header)]


def _numbers(stated: Mapping[str, Any]) -> Iterator[str]:
    """Numbers that any architecture computes with."""
    for key, value in stated.items():
        if isinstance(value, float) and not isfinite(value):
            yield f"{key} is {value}, which is no number to compute with"
        elif key in EPSILONS and not (isinstance(value, float) and 0 < value < 1):
            yield f"{key} is {shown(value)}, and a norm adds a number between 0 and 1"
        elif key.startswith(BASE) and not (isinstance(value, float) and value > 0):
            yield f"{key} is {shown(value)}, and rotary frequencies are powers of a number above 0"
        elif key.startswith("rope.scaling.") and isinstance(value, float) and value < 0:
            yield f"{key} is {value:g}, less than 0"
        elif type(value) is int and abs(value) > MOST:
            yield f"{key} is {value}, more than any model has"
    if type(context := stated.get(CONTEXT, 1)) is not int or context < 1:
        yield f"{CONTEXT} is {shown(context)}, and a model takes at least 1 token"


def _experts(stated: Mapping[str, Any]) -> Iterator[str]:
    used, there = stated.get("expert_used_count", 0), stated.get("expert_count", 0)
    if type(used) is int and type(there) is int and not (there > 0) <= used <= there:
        yield f"expert_used_count is {used}, of {there} experts"


def _known(stated: Mapping[str, Any]) -> Iterator[str]:
    """Numbers that llama, qwen2 and qwen3 compute with."""
    for key in COUNTS:
        value = stated.get(key, 1)
        if not isinstance(value, Listed) and (type(value) is not int or value < 1) and key != CONTEXT:
            yield f"{key} is {shown(value)}, and it is a whole number from 1 on"
    yield from (f"{key} is missing" for key in (EPSILON, CONTEXT) if key not in stated)
    kind = stated.get("rope.scaling.type", NONE)
    if kind not in SCALINGS:
        yield f"rope.scaling.type is {shown(kind)}, and it is one of {', '.join(SCALINGS)}"
    heads, kv, hidden = (stated.get(key) for key in (HEADS, KV_HEADS, HIDDEN))
    if type(heads) is not int or type(hidden) is not int or heads < 1:
        return  # lists, or said already
    if type(kv) is int and kv > 0 and heads % kv:
        yield f"{KV_HEADS} is {kv}, which does not divide the {heads} heads of queries"
    if KEY not in stated and hidden % heads:
        yield f"{HEADS} is {heads}, which does not divide {hidden} features"
    width, rotated = stated.get(KEY, hidden // heads), stated.get(ROTATED)
    if type(rotated) is int and type(width) is int and (rotated > width or rotated % 2):
        yield f"{ROTATED} is {rotated}, and it is an even number up to the {width} features of a head"
    if stated.get(VALUE, width) != width:
        yield f"{VALUE} is {stated[VALUE]}, and keys of a head have {width} features"


def _tokens(header: Header, stated: Any, at: str) -> Iterator[str]:
    """Numbers of tokens that do not agree, and tokens that are named by a number and are not there."""
    metadata, embedding = header.metadata, header.tensors.get(EMBEDDING)
    listed = metadata.get(TOKENS)
    if listed is None and metadata.get("tokenizer.ggml.model", WITHOUT_TOKENS[0]) not in WITHOUT_TOKENS:
        yield f"{TOKENS} is missing"
    if listed is not None and not isinstance(listed, Listed):
        yield f"{TOKENS} is {shown(listed)}, and it is a list"
        return
    rows = embedding.shape[0] if embedding is not None and len(embedding.shape) == 2 else None
    count = rows if listed is None else listed.count
    if count is None:
        return
    if rows is not None and count != rows:
        yield f"{TOKENS} has {count} tokens, and {EMBEDDING} {rows} rows"
    if stated is not None and stated != count:
        yield f"{at}vocab_size is {shown(stated)}, and there are {count} tokens"
    for name in LISTS:
        values = metadata.get(f"tokenizer.ggml.{name}")
        if values is not None and (not isinstance(values, Listed) or values.count != count):
            yield f"tokenizer.ggml.{name} is not one value for each of {count} tokens"
    for key, value in metadata.items():
        if key.startswith("tokenizer.") and key.endswith("token_id") and not 0 <= _whole(value) < count:
            yield f"{key} is {shown(value)}, and there are {count} tokens"


def _whole(value: Any) -> int:
    return value if type(value) is int else -1


def _factors(header: Header) -> Iterator[str]:
    """Rotary factors that frequencies cannot be divided by."""
    entry = header.tensors.get(ROPE_FACTORS)
    if entry is not None and entry.kind is Kind.F32:
        factors = np.memmap(header.path, np.float32, "r", entry.start, entry.shape)
        if not bool((factors > 0).all()):
            yield f"{ROPE_FACTORS} has a factor of {factors.min():g}, and rotary frequencies are divided by it"
