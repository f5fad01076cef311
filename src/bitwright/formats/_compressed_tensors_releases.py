"""The releases of transformers and compressed-tensors that load a compressed-tensors folder wrong, or not at all.

Tried with the pairs of ``benchmarks/results/matrix.md`` (``make matrix``); the reasons are theirs, not the folder's.
"""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKED = "pack-quantized"
ONE_SCHEME = (5, 23)
"""transformers from here on dequantizes all linears of a folder with ``dequantize`` by the scheme of one of them."""
ON_META, UNPACKED_ZEROS = (5, 23), (0, 18)
"""transformers from here on, with compressed-tensors from here on, expects zero points that are not packed."""
DENSE_WORDS, UNEVEN = (0, 18), (3, 5, 6, 7)
"""compressed-tensors before this one left bits of a word unused if ``UNEVEN`` bits do not fill it."""
ASYMMETRIC_CACHE = (0, 18)
"""compressed-tensors before this one raises an error for an asymmetric ``kv_cache_scheme``."""
NO_CACHE_ARGUMENT = (5, 24)
"""transformers from here on calls the cache of an attention ``cache``; compressed-tensors 0.20.1 does not know it."""


def wrongly_loaded(config: Mapping[str, Any], installed: tuple[str, str] | None = None) -> str | None:
    """Say what is wrong with a folder once plain transformers has loaded it; None if nothing is known to be.

    ``config`` is the folder's quantization_config. ``installed`` are the versions of transformers and
    compressed-tensors, by default those of this environment.
    """
    transformers, library = installed or _installed()
    try:
        reason = _reason(config, _release(transformers), _release(library))
    except (AttributeError, TypeError):  # numbers where tables should be: who reads the folder says so
        return None
    if reason is None:
        return None
    return f"transformers {transformers} with compressed-tensors {library} {reason}"


def one_scheme(config: Mapping[str, Any]) -> bool:
    """Whether the weights of all linears are on one grid and in one kind of group."""
    weights = _weights(config)
    return all(args == weights[0] for args in weights)


def _has_attention(config: Mapping[str, Any]) -> bool:
    """Whether a quantization_config has an entry for attention, whose grid queries share with keys and values."""
    groups = (config.get("config_groups") or {}).values()
    return any(not group.get("weights") and group.get("input_activations") for group in groups)


def _reason(config: Mapping[str, Any], transformers: tuple[int, ...], library: tuple[int, ...]) -> str | None:
    dequantized = bool(config.get("dequantize"))
    if transformers >= NO_CACHE_ARGUMENT and (config.get("kv_cache_scheme") or _has_attention(config)):
        return "leaves keys, values and queries in full precision, and says nothing"
    if library < DENSE_WORDS and any(weights.get("num_bits") in UNEVEN for weights in _weights(config, layout=PACKED)):
        return "packs 3, 5, 6 and 7 bits in another way, no code in two words"
    cache = config.get("kv_cache_scheme") or {}
    if library < ASYMMETRIC_CACHE and not cache.get("symmetric", True):
        return "has no asymmetric KV cache beside activations in full precision"
    if transformers >= ONE_SCHEME and dequantized and not one_scheme(config):
        return "takes one scheme for all linears, and these have several"
    packed = any(not weights.get("symmetric", True) for weights in _weights(config, layout=PACKED))
    if transformers >= ON_META and library >= UNPACKED_ZEROS and packed and not dequantized:
        return "refuses packed zero points (weight_zero_point, size mismatch) unless weights alone are quantized, alike"
    return None


def _weights(config: Mapping[str, Any], layout: str | None = None) -> list[Mapping[str, Any]]:
    """The arguments of the weights of each group of linears; of those in a layout if one is named."""
    groups = [group for group in (config.get("config_groups") or {}).values() if group.get("weights")]
    stored = [(group.get("format") or config.get("format"), group["weights"]) for group in groups]
    return [weights for name, weights in stored if layout in (None, name)]


def _installed() -> tuple[str, str]:
    try:
        return version("transformers"), version("compressed-tensors")
    except PackageNotFoundError:  # nothing is known of what will load the folder
        return "0", "99"


def _release(text: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in text.split(".")[:2])
