"""Whether a file says of a model what its config.json says: sizes, norms, rotary embeddings.

What a file does not say is what llama.cpp takes then. Lists (sizes that differ from block to block) are not compared.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Kind

from bitwright.core.decoder import THETA
from bitwright.formats.gguf.architecture import LINEAR, ROPE_FACTORS, YARN, Architecture
from bitwright.formats.gguf.header import Header, Listed

CHOSEN = ("context_length", "vocab_size")
"""Settings that may differ from config.json: how long a context is to be, what the tokens say as well."""
NONE = "none"
"""Rotary embeddings that are not scaled."""
ALIKE, FACTORS_ALIKE = 1e-6, 1e-4
"""How far two numbers may be apart, relatively: settings, and rotary factors, which are computed."""


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
    named, tokens = header.says.get("general.architecture"), header.says.get("tokenizer.ggml.tokens")
    stated = {key: header.says.get(f"{named}.{gguf}") for key, gguf in DIMENSIONS.items()}
    listed = tokens.count if isinstance(tokens, Listed) else header.says.get(f"{named}.vocab_size")
    return stated | {"vocab_size": listed}


def unlike(header: Header, into: Architecture) -> list[str]:
    """In words what a file says otherwise than a model's config.json, both values with it."""
    named = header.says.get("general.architecture")
    if named != into.name:
        return [f"general.architecture is {named}, the folder's {into.name}"]
    ours = _completed({entry.key: entry.value for entry in into.entries()}, into.name)
    theirs = _completed(header.says, into.name)
    wrong = [
        f"{key} is {_shown(theirs[key])}, the folder's {_shown(value)}"
        for key, value in ours.items()
        if not key.endswith(CHOSEN) and key in theirs and _differ(theirs[key], value)
    ]
    return [*wrong, *_other_factors(header, into)]


def lacks_factors(header: Header, into: Architecture) -> Iterator[str]:
    """In words that a model has rotary factors, and the file none."""
    if into.rope_factors() is not None and ROPE_FACTORS not in header.tensors:
        yield f"{ROPE_FACTORS} is not there, the folder's rotary embeddings are scaled as {into.decoder.rope.kind}"


def _completed(says: Mapping[str, Any], at: str) -> dict[str, Any]:
    """The same with what llama.cpp takes where nothing is said; a scaling by 1 is none."""
    heads, hidden = says.get(f"{at}.attention.head_count"), says.get(f"{at}.embedding_length")
    found: dict[str, Any] = {f"{at}.rope.freq_base": THETA, f"{at}.attention.head_count_kv": heads}
    if isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
        found[f"{at}.attention.key_length"] = found[f"{at}.attention.value_length"] = hidden // heads
    found |= says
    kind, factor = f"{at}.rope.scaling.type", f"{at}.rope.scaling.factor"
    scaled = found.get(factor, found.get(f"{at}.rope.scale_linear", 1.0))
    found |= {kind: found.get(kind, LINEAR), factor: scaled or 1.0}
    if found[kind] == NONE or (found[kind] in (LINEAR, YARN) and found[factor] == 1.0):
        found |= {kind: NONE, factor: 1.0}
    return found


def _differ(theirs: Any, ours: Any) -> bool:
    if isinstance(theirs, str) or isinstance(ours, str):
        return bool(theirs != ours)
    return isinstance(theirs, int | float) and not abs(theirs - ours) <= ALIKE * abs(ours)


def _shown(value: Any) -> str:
    if not isinstance(value, int | float):
        return str(value)
    return str(int(value)) if float(value).is_integer() else f"{value:g}"


def _other_factors(header: Header, into: Architecture) -> Iterator[str]:
    """The rotary factors of a file beside the model's, which are 1 where its config.json asks for none."""
    entry, made = header.tensors.get(ROPE_FACTORS), into.rope_factors()
    if entry is None:
        return
    wanted = np.ones(into.decoder.head_dim // 2, np.float32) if made is None else made.numpy()
    if entry.kind is not Kind.F32 or entry.shape != wanted.shape:
        yield f"{ROPE_FACTORS} is {entry.kind.name} {list(entry.shape)}, the folder's F32 {list(wanted.shape)}"
        return
    found = np.memmap(header.path, np.float32, "r", entry.start, entry.shape)
    apart = np.abs(found / wanted - 1)
    worst = int(np.argmax(np.where(np.isnan(apart), np.inf, apart)))
    if not apart[worst] <= FACTORS_ALIKE:
        yield f"factor {worst} of {ROPE_FACTORS} is {found[worst]:g}, the folder's {wanted[worst]:g}"
