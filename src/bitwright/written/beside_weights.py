"""The files beside the weights: config.json, the allocation, and sidecar files of the original."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bitwright.checkpoint.ranges import file_digest
from bitwright.checkpoint.sidecar_files import COPIED
from bitwright.checkpoint.writer import copy_file, write_json
from bitwright.core.errors import CheckpointError
from bitwright.core.format import TensorFormat
from bitwright.core.quantized import WrittenModel
from bitwright.core.scheme import Allocation

CONFIG, ALLOCATION = "config.json", "allocation.json"


def write_config(
    config: dict[str, Any], format: TensorFormat, written: WrittenModel, folder: Path
) -> dict[str, Any] | None:
    """Write config.json with the format's description of the quantized model, and return that description."""
    if written.scheme.kv is not None:  # compressed-tensors reads num_key_value_heads for every attention
        for part in (config, config.get("text_config")):
            if isinstance(part, dict) and "num_attention_heads" in part:
                part.setdefault("num_key_value_heads", part["num_attention_heads"])
    described = format.config(written)
    if described is not None:
        config["quantization_config"] = described
    write_json(folder / CONFIG, config)
    return described


def write_allocation(allocation: Allocation, linears: Iterable[str], folder: Path) -> None:
    """Write allocation.json: the scheme of each of these linears, for ``--allocation`` of another run."""
    write_json(folder / ALLOCATION, allocation.to_json(linears))


def sidecars(source: Path) -> dict[str, str]:
    """The sidecar files of a model (tokenizer, processors, generation settings, licence): digests by path.

    Raises CheckpointError for a file that cannot be read.
    """
    paths = sorted({path for pattern in COPIED for path in source.glob(pattern) if path.is_file()})
    try:
        return {path.relative_to(source).as_posix(): file_digest(path) for path in paths}
    except OSError as error:
        raise CheckpointError(f"{source}: a file beside the weights cannot be read: {error}") from error


def copy_along(source: Path, folder: Path, expected: Mapping[str, str] | None = None) -> None:
    """Copy the sidecar files of a model.

    Raises CheckpointError if they are not the ``expected`` ones, which were there when the run began.
    """
    now = sidecars(source)
    if expected is not None and now != expected:
        name = min(name for name in {*now, *expected} if now.get(name) != expected.get(name))
        what = "is gone" if name not in now else "was not there" if name not in expected else "was another file"
        when = "since the run began" if name not in now else "when the run began"
        raise CheckpointError(
            f"{source / name} {what} {when}: the result would not be of one model. Put it back as it was, then repeat "
            "the command: what is finished is kept"
        )
    for name in now:
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        copy_file(source / name, target)
