"""Values in a config.json with which nothing can be computed: refused before anything is built or quantized.

NaN, an epsilon below 0, rotary frequencies whose base or factor is 0: transformers builds a model of these without a
word, and its logits are NaN.
"""

import re
from collections.abc import Iterator, Mapping
from math import isfinite, isnan
from typing import Any

from bitwright.core.errors import CheckpointError, shown

EPSILON = re.compile(r"(^|_)eps(ilon)?(_|$)")
BASE = re.compile(r"^((global|local|swa|compress)_)?rope_theta$|^(rotary|rope|position)_.*base(_freq)?$")
"""Bases of rotary frequencies. Lists with a base for each layer (``layer_rope_theta``) say 0 for layers without."""
ROPE = re.compile(r"(^|\.)rope_(parameters|scaling)(\.|$)")
LOW, HIGH = "low_freq_factor", "high_freq_factor"
SCALINGS = ("factor", LOW, HIGH, "long_factor", "short_factor", "beta_fast", "beta_slow")
"""Numbers within a config's rotary scaling that frequencies are divided by."""
LENGTH = "original_max_position_embeddings"
MAY_BE_INFINITE = re.compile(r"limit|range|clip|clamp|(^|_)(min|max)(_|$)")
"""Bounds: an infinite one bounds nothing."""
UNREAD = ("quantization_config", "id2label", "label2id", "task_specific_params")
"""Parts of a config.json whose numbers are no sizes or constants of the model."""


def require_possible_values(config: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError for a value of a config.json, named ``where``, that no model can compute with."""
    for place, key, value in numbers(config):
        if why := _objection(place, key, value):
            raise CheckpointError(
                f"{where} says {shown(value)} for {place}, and {why}; compare it with the original repository's, or "
                "download it again"
            )


def _objection(place: str, key: str, value: float) -> str | None:
    """Why a number cannot be; None if it can."""
    if isnan(value):
        return "a model that computes with that gives no number"
    within_rope, finite = ROPE.search(place), isfinite(value)
    if EPSILON.search(key) and not (finite and value >= 0):
        return "a norm adds a finite number to a square, 0 or more"
    if BASE.search(key) and not (finite and value > 0):
        return "rotary frequencies are powers of it, which takes a finite number above 0"
    if within_rope and key in (*SCALINGS, LENGTH) and not (finite and value > 0):
        return "rotary frequencies are divided by it, which takes a finite number above 0"
    if not finite and not MAY_BE_INFINITE.search(key):
        return "no model computes with that"
    return None


def numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Yield place, key and value of each number; one in a list has the key of the list."""
    waiting: list[tuple[str, str, Any]] = [(str(key), str(key), value) for key, value in config.items()]
    while waiting:
        place, key, value = waiting.pop()
        if key in UNREAD:
            continue
        if isinstance(value, dict):
            waiting += [(f"{place}.{inner}", str(inner), item) for inner, item in value.items()]
        elif isinstance(value, list):
            waiting += [(place, key, item) for item in value]
        elif type(value) in (int, float):
            yield place, key, value
