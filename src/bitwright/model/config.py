"""Read the config.json of a model with transformers, and compare it with that of another model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.errors import CheckpointError, shown
from bitwright.model.fitting import require_fitting

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
QUANTIZATION = "quantization_config"
IMPLEMENTATIONS = {
    "_attn_implementation": ("eager", "sdpa", "flex_attention"),
    "_experts_implementation": ("eager", "batched_mm", "grouped_mm"),
}
"""What a config may choose to compute with: what transformers or torch brings. Other names are code from elsewhere."""


def architecture(config: Mapping[str, Any]) -> str:
    """The class that config.json names, ``?`` if it names none."""
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else "?"


def model_config(checkpoint: Checkpoint) -> "PretrainedConfig":
    """The config as transformers reads it, offline and without remote code, once it fits the tensors.

    Raises CheckpointError.
    """
    require_fitting(checkpoint)
    folder = checkpoint.folder
    try:
        config = read_config(folder)
    except Exception as error:  # transformers validates with several libraries, which have their own exceptions
        raise CheckpointError(
            f"{folder}/config.json: transformers cannot read it: {error}. Compare it with the original repository's"
        ) from error
    if checkpoint.config.get(QUANTIZATION) is None and hasattr(config, QUANTIZATION):
        delattr(config, QUANTIZATION)  # the checkpoint shows its weights dequantized
    return config


def text_config(checkpoint: Checkpoint) -> "PretrainedConfig":
    """The config of the text model, a part of the whole if there are several models. Raises CheckpointError."""
    return text_config_of(model_config(checkpoint))


def text_config_of(config: "PretrainedConfig") -> "PretrainedConfig":
    """The part of a config that describes the text model's decoder; the whole config if it has no parts."""
    return config.get_text_config(decoder=True)


def read_config(folder: Path) -> "PretrainedConfig":
    """The config as transformers reads it; the code that it names to compute with is forgotten, not fetched."""
    from transformers import AutoConfig

    config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    for part in _parts(config):
        for key, known in IMPLEMENTATIONS.items():
            if getattr(part, key, None) not in (None, *known):
                setattr(part, key, None)
    return config


def code_from_elsewhere(config: Mapping[str, Any]) -> str | None:
    """What a config.json asks to compute with that transformers and torch do not bring; None if it asks for nothing.

    ``read_config`` forgets it, so a model is loaded here as if it were not asked for; elsewhere it takes a package.
    """
    for key, known in IMPLEMENTATIONS.items():
        for name in (key, key.removeprefix("_")):
            asked = config.get(name)
            for value in asked.values() if isinstance(asked, dict) else [asked]:
                if isinstance(value, str) and value not in known:
                    return f"{name} {shown(value)}"
    inner = (value for key, value in config.items() if isinstance(value, dict) and key.endswith("_config"))
    return next(filter(None, map(code_from_elsewhere, inner)), None)


def _parts(config: Any) -> "Iterator[PretrainedConfig]":
    """A config and the configs within it."""
    from transformers import PretrainedConfig

    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PretrainedConfig):
            yield from _parts(value)


@contextmanager
def without_hub_kernels() -> Iterator[None]:
    """A context in which transformers fetches no kernels from the hub, whatever a model's folder asks for."""
    from transformers import integrations

    def refuse(name: str, *_: Any, **__: Any) -> Any:
        raise ImportError(f"the folder asks for the kernel {name}, which is code from elsewhere: Bitwright runs none")

    fetching: Any = getattr(integrations, "hub_kernels", None)
    if not hasattr(fetching, "get_kernel"):  # a transformers that fetches none
        yield
        return
    original, fetching.get_kernel = fetching.get_kernel, refuse
    try:
        yield
    finally:
        fetching.get_kernel = original


def apart(here: Mapping[str, Any], there: Mapping[str, Any], keys: Sequence[str] = DIMENSIONS) -> str:
    """The keys in which two configs differ, with both values, in words; "" if there are none.

    Only keys that both have are compared; by default dimensions and architecture.
    """
    return ", ".join(
        f"{key} {there[key]} there and {here[key]} here"
        for key in keys
        if here.get(key) is not None and there.get(key) is not None and here[key] != there[key]
    )
