"""Qwen3: Llama's decoder with an RMSNorm on each query and key head; attention has biases if config.json says so."""

from dataclasses import replace

from bitwright.core.block import Architecture, Family
from bitwright.core.decoder import Config, Decoder, flag, sliding_window

DEFAULTS = {"head_dim": 128, "num_key_value_heads": 32, "sliding_window": 4096}
"""What transformers takes if config.json leaves a key out."""


def decoder(config: Config) -> Decoder:
    """Read a Qwen3's config.json."""
    config = {**DEFAULTS, **config}
    bias, window = flag(config, "attention_bias"), sliding_window(config, flag(config, "use_sliding_window"))
    return replace(Decoder.of(config), qkv_bias=bias, o_bias=bias, qk_norm=True, window=window)


def family(config: Config) -> Family:
    """Say what formats ask of a Qwen3 with this config.json."""
    return Family("Qwen3Attention", decoder(config).head_dim)


ARCHITECTURE = Architecture(decoder, family)
