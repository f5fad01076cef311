"""What lies beside the weights: config.json, and the files of the original that go along."""

from pathlib import Path
from typing import Any

from bitwright.checkpoint.writer import copy_file, write_json
from bitwright.core.format import TensorFormat
from bitwright.core.quantized import WrittenModel
from bitwright.core.registry import format_of
from bitwright.prepare.job import Job

CONFIG = "config.json"
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
    "LICENSE*",
    "USE_POLICY*",
    "NOTICE*",
)
"""What goes along besides the weights, as file name patterns."""


def write_companions(job: Job, reports: list[dict[str, Any]], folder: Path) -> dict[str, Any] | None:
    """config.json with its quantization_config, which is returned, and the files that go along."""
    config = dict(job.source.checkpoint.config)
    if job.recipe.quantize_lm_head:
        config["tie_word_embeddings"] = False
    format = format_of(job.settled_format(reports))
    assert isinstance(format, TensorFormat)
    described = write_config(config, format, job.written(reports), folder)
    copy_companions(job.source.checkpoint.folder, folder)
    return described


def write_config(
    config: dict[str, Any], format: TensorFormat, written: WrittenModel, folder: Path
) -> dict[str, Any] | None:
    """config.json, with what a format has to say of the quantized model; that is returned."""
    if written.scheme.kv is not None:  # compressed-tensors asks every attention for it
        config.setdefault("num_key_value_heads", config["num_attention_heads"])
    described = format.config(written)
    if described is not None:
        config["quantization_config"] = described
    write_json(folder / CONFIG, config)
    return described


def copy_companions(source: Path, folder: Path) -> None:
    """The files that go along with a model: tokenizer, generation settings, licence."""
    for path in sorted({path for pattern in COPIED for path in source.glob(pattern) if path.is_file()}):
        target = folder / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        copy_file(path, target)
