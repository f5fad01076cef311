"""The files beside the weights: config.json, the allocation, and sidecar files of the original."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bitwright.checkpoint.writer import copy_file, write_json
from bitwright.core.format import TensorFormat
from bitwright.core.quantized import WrittenModel
from bitwright.core.scheme import Allocation

CONFIG, ALLOCATION = "config.json", "allocation.json"
COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates/*",
    "generation_config.json",
    "*processor_config.json",
    "image_processor*",
    "feature_extractor*",
    "LICENSE*",
    "USE_POLICY*",
    "NOTICE*",
)
"""The sidecar files that are copied, as file name patterns."""


def write_config(
    config: dict[str, Any], format: TensorFormat, written: WrittenModel, folder: Path
) -> dict[str, Any] | None:
    """Write config.json with the format's description of the quantized model, and return that description."""
    if written.scheme.kv is not None:  # compressed-tensors reads num_key_value_heads for every attention
        config.setdefault("num_key_value_heads", config["num_attention_heads"])
    described = format.config(written)
    if described is not None:
        config["quantization_config"] = described
    write_json(folder / CONFIG, config)
    return described


def write_allocation(allocation: Allocation, linears: Iterable[str], folder: Path) -> None:
    """Write allocation.json: the scheme of each of these linears, for ``--allocation`` of another run."""
    write_json(folder / ALLOCATION, allocation.to_json(linears))


def copy_along(source: Path, folder: Path) -> None:
    """Copy the sidecar files of a model: tokenizer, processors of images and sound, generation settings, licence."""
    for path in sorted({path for pattern in COPIED for path in source.glob(pattern) if path.is_file()}):
        target = folder / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        copy_file(path, target)
