"""Llama 1, 2 and 3: RMSNorm, rotary positions, grouped-query attention, gated MLP, tied or untied embeddings."""

from dataclasses import replace

from bitwright.core.block import Architecture, Family
from bitwright.core.decoder import Config, Decoder, flag


def decoder(config: Config) -> Decoder:
    """Read a Llama's config.json: attention and MLP have biases if it asks for them."""
    attention = flag(config, "attention_bias")
    return replace(Decoder.of(config), qkv_bias=attention, o_bias=attention, mlp_bias=flag(config, "mlp_bias"))


def family(config: Config) -> Family:
    """Say what formats ask of a Llama with this config.json."""
    return Family("LlamaAttention", decoder(config).head_dim)


ARCHITECTURE = Architecture(decoder, family)
