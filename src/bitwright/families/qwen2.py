"""Qwen2 and Qwen2.5: Llama's decoder with biases on queries, keys and values; a window only if it is asked for."""

from dataclasses import replace

from bitwright.core.block import Architecture, Family
from bitwright.core.decoder import Config, Decoder, flag, sliding_window

DEFAULTS = {"num_key_value_heads": 32, "sliding_window": 4096}
"""What transformers takes if config.json leaves a key out."""


def decoder(config: Config) -> Decoder:
    """Read a Qwen2's config.json."""
    config = {**DEFAULTS, **config}
    window = sliding_window(config, flag(config, "use_sliding_window"))
    return replace(Decoder.of(config), qkv_bias=True, window=window)


def family(config: Config) -> Family:
    """Say what formats ask of a Qwen2 with this config.json."""
    return Family("Qwen2Attention", decoder(config).head_dim)


ARCHITECTURE = Architecture(decoder, family)
