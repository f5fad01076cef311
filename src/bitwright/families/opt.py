"""OPT: LayerNorm, biases, learned positions, ReLU: the architecture on which OmniQuant shifts channels too."""

from bitwright.core.block import Architecture, Family
from bitwright.core.decoder import Config


def family(config: Config) -> Family:
    """Say what formats ask of an OPT with this config.json: its MLP sees all tokens of a batch as one matrix."""
    return Family(
        "OPTAttention",
        config["hidden_size"] // config["num_attention_heads"],
        flattened=(("fc1", config["hidden_size"]), ("fc2", config["ffn_dim"])),
    )


ARCHITECTURE = Architecture(family=family)
