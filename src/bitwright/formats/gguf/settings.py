"""A comparison of a GGUF file's metadata with a model's config.json: sizes, norms, rotary embeddings.

A setting that a file leaves out has the value that llama.cpp takes then. Lists (sizes that differ from block to block)
are not compared.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Kind

from bitwright.core.decoder import THETA
from bitwright.formats.gguf.architecture import LINEAR, ROPE_FACTORS, YARN, Architecture
from bitwright.formats.gguf.header import Header, Listed

CHOSEN = ("context_length", "vocab_size")
"""Settings that may differ from config.json: the length of a context, and a number that the tokens tell as well."""
NONE = "none"
"""The scaling of rotary embeddings that are not scaled."""
TOKENS = "tokenizer.ggml.tokens"
ALIKE, FACTORS_ALIKE = 1e-6, 1e-4
"""The relative difference that two numbers may have: settings, and rotary factors, which are computed."""


DIMENSIONS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
}
"""Keys of config.json, and GGUF's for the same dimensions."""


def dimensions(header: Header) -> dict[str, Any]:
    """Read the dimensions that a header states, by the keys of config.json; those that it does not state are None.

    The vocabulary is as many tokens as the file lists.
    """
    metadata = header.metadata
    named, tokens = metadata.get("general.architecture"), metadata.get(TOKENS)
    stated = {key: metadata.get(f"{named}.{gguf}") for key, gguf in DIMENSIONS.items()}
    listed = tokens.count if isinstance(tokens, Listed) else metadata.get(f"{named}.vocab_size")
    return stated | {"vocab_size": listed}


def unlike(header: Header, into: Architecture) -> list[str]:
    """The settings in which a file differs from a model's config.json, in words, with both values."""
    named = header.metadata.get("general.architecture")
    if named != into.name:
        return [f"general.architecture is {named}, the folder's {into.name}"]
    ours = _completed({entry.key: entry.value for entry in into.entries()}, into.name)
    theirs = _completed(header.metadata, into.name)
    wrong = [
        f"{key} is {_shown(theirs[key])}, the folder's {_shown(value)}"
        for key, value in ours.items()
        if not key.endswith(CHOSEN) and key in theirs and _differ(theirs[key], value)
    ]
    return [*wrong, *_other_factors(header, into)]


def lacks_factors(header: Header, into: Architecture) -> Iterator[str]:
    """Yield, in words, that a model has rotary factors and the file none."""
    if into.rope_factors() is not None and ROPE_FACTORS not in header.tensors:
        yield f"{ROPE_FACTORS} is not there, the folder's rotary embeddings are scaled as {into.decoder.rope.kind}"


def _completed(metadata: Mapping[str, Any], at: str) -> dict[str, Any]:
    """Metadata with llama.cpp's values for those that are left out; a scaling by 1 is none."""
    heads, hidden = metadata.get(f"{at}.attention.head_count"), metadata.get(f"{at}.embedding_length")
    whole: dict[str, Any] = {f"{at}.rope.freq_base": THETA, f"{at}.attention.head_count_kv": heads}
    if isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
        whole[f"{at}.attention.key_length"] = whole[f"{at}.attention.value_length"] = hidden // heads
    whole |= metadata
    kind, factor = f"{at}.rope.scaling.type", f"{at}.rope.scaling.factor"
    scaled = whole.get(factor, whole.get(f"{at}.rope.scale_linear", 1.0))
    whole |= {kind: whole.get(kind, LINEAR), factor: scaled or 1.0}
    if whole[kind] == NONE or (whole[kind] in (LINEAR, YARN) and whole[factor] == 1.0):
        whole |= {kind: NONE, factor: 1.0}
    return whole


def _differ(theirs: Any, ours: Any) -> bool:
    if isinstance(theirs, str) or isinstance(ours, str):
        return bool(theirs != ours)
    return isinstance(theirs, int | float) and not abs(theirs - ours) <= ALIKE * abs(ours)


def _shown(value: Any) -> str:
    if not isinstance(value, int | float):
        return str(value)
    return str(int(value)) if float(value).is_integer() else f"{value:g}"


def _other_factors(header: Header, into: Architecture) -> Iterator[str]:
    """Compare a file's rotary factors with the model's, which are 1 if its config.json asks for none."""
    entry, factors = header.tensors.get(ROPE_FACTORS), into.rope_factors()
    if entry is None:
        return
    wanted = np.ones(into.decoder.head_dim // 2, np.float32) if factors is None else factors.numpy()
    if entry.kind is not Kind.F32 or entry.shape != wanted.shape:
        yield f"{ROPE_FACTORS} is {entry.kind.name} {list(entry.shape)}, the folder's F32 {list(wanted.shape)}"
        return
    stored = np.memmap(header.path, np.float32, "r", entry.start, entry.shape)
    apart = np.abs(stored / wanted - 1)
    worst = int(np.argmax(np.where(np.isnan(apart), np.inf, apart)))
    if not apart[worst] <= FACTORS_ALIKE:
        yield f"factor {worst} of {ROPE_FACTORS} is {stored[worst]:g}, the folder's {wanted[worst]:g}"
