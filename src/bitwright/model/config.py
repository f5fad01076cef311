"""Read the config.json of a model with transformers, and compare it with that of another model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitwright.core.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SETTINGS = (
    *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "rms_norm_eps", "layer_norm_eps"),
    *("layer_norm_epsilon", "hidden_act", "hidden_activation", "sliding_window"),
)
"""Keys of config.json that change what a model computes with given weights."""
DIMENSIONS = (
    "model_type",
    "num_hidden_layers",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
"""Keys of config.json that tell one model from another."""


def architecture(config: Mapping[str, Any]) -> str:
    """The class that config.json names, ``?`` if it names none."""
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else "?"


def model_config(folder: Path) -> "PretrainedConfig":
    """The config as transformers reads it, offline and without remote code. Raises CheckpointError."""
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers validates with several libraries, which have their own exceptions
        raise CheckpointError(
            f"{folder}/config.json: transformers cannot read it: {error}. Compare it with the original repository's"
        ) from error
    return config


def text_config(folder: Path) -> "PretrainedConfig":
    """The config of a folder's text model, a part of the whole if there are several models. Raises CheckpointError."""
    return text_config_of(model_config(folder))


def text_config_of(config: "PretrainedConfig") -> "PretrainedConfig":
    """The part of a config that describes the text model's decoder; the whole config if it has no parts."""
    return config.get_text_config(decoder=True)


def apart(here: Mapping[str, Any], there: Mapping[str, Any], keys: Sequence[str] = DIMENSIONS) -> str:
    """The keys in which two configs differ, with both values, in words; "" if there are none.

    Only keys that both have are compared; by default dimensions and architecture.
    """
    return ", ".join(
        f"{key} {there[key]} there and {here[key]} here"
        for key in keys
        if here.get(key) is not None and there.get(key) is not None and here[key] != there[key]
    )
