"""Mistral: Llama's decoder without biases; attention may reach back no further than a window."""

from dataclasses import replace

from bitwright.core.block import Architecture, Family
from bitwright.core.decoder import Config, Decoder, sliding_window

DEFAULTS = {"num_key_value_heads": 8, "sliding_window": 4096}
"""What transformers takes if config.json leaves a key out."""


def decoder(config: Config) -> Decoder:
    """Read a Mistral's config.json."""
    config = {**DEFAULTS, **config}
    return replace(Decoder.of(config), window=sliding_window(config))


def family(config: Config) -> Family:
    """Say what formats ask of a Mistral with this config.json."""
    return Family("MistralAttention", decoder(config).head_dim)


ARCHITECTURE = Architecture(decoder, family)
