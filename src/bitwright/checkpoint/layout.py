"""The files of a model folder: its config.json, and which weight file holds which tensor."""

from pathlib import Path, PurePosixPath
from typing import Any

from bitwright.checkpoint.header import MAX_TENSORS, Header, read_header
from bitwright.core.errors import CheckpointError, shown
from bitwright.core.small_files import CONFIG_BYTES, SMALL_BYTES, parse_object, read_small, refuse_too_many

CONFIG, ADAPTER = "config.json", "adapter_config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth")
SHOWN_NAMES = 8
MAX_SHARDS = 10_000
"""The most weight files of a model; the largest known models have a few hundred."""
FEW_TENSORS, LEAST_BYTES = 8_000, 4096
"""Tensors of any size, and the bytes that each other one has on average: every tensor takes time, empty ones too."""
READ_BY_LIBRARIES = {
    **dict.fromkeys(("config.json", "generation_config.json", "processor_config.json"), CONFIG_BYTES),
    **dict.fromkeys(
        ("preprocessor_config.json", "video_preprocessor_config.json", "adapter_config.json"), CONFIG_BYTES
    ),
    **dict.fromkeys(("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"), SMALL_BYTES),
    **dict.fromkeys(("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tekken.json"), SMALL_BYTES),
    **dict.fromkeys(("tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json"), SMALL_BYTES),
    "bitwright.json": SMALL_BYTES,
}
"""Small files that libraries open in a model folder, with the most bytes of each."""


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config.json of a model folder. Raises CheckpointError if `folder` is no model folder."""
    if not folder.exists():
        raise CheckpointError(f"{folder}: there is no such folder; is the path spelled right, is the disk mounted?")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: a file, no model folder; give the folder that contains {CONFIG}")
    path = folder / CONFIG
    _check_small_files(folder)
    if not path.is_file():
        if (folder / ADAPTER).is_file():
            raise CheckpointError(f"{folder}: {merge_adapter(folder)}")
        raise CheckpointError(
            f"{folder}: is no model folder: it has no {CONFIG}; give the folder that `save_pretrained` or "
            "`huggingface-cli download` wrote"
        )
    return parse_object(read_bytes(path), str(path))


def merge_adapter(folder: Path) -> str:
    """The rest of the message for an adapter in place of a whole model."""
    return (
        "is an adapter (LoRA), not a whole model. Merge the adapter into its base model once, and name the result:\n"
        f"  model = peft.AutoPeftModelForCausalLM.from_pretrained({str(folder)!r}).merge_and_unload()\n"
        f"  model.save_pretrained({str(folder) + '-merged'!r})\n"
        "  then copy the tokenizer's files of the base model into it"
    )


def find_weights(folder: Path) -> tuple[dict[str, Header], dict[str, str]]:
    """The checked header of each weight file by its name, and the file name of each tensor by its name.

    The order of preference is that of transformers: `model.safetensors`, then an index of shards, then whatever
    *.safetensors there are. Raises CheckpointError.
    """
    if (folder / SINGLE).exists():
        return _by_agreement(folder, [SINGLE])
    if (folder / INDEX).exists():
        return _by_index(folder)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(_no_weights(folder))
    return _by_agreement(folder, files)


def read_bytes(path: Path) -> bytes:
    """Read config.json or the index whole. Raises CheckpointError if it is too long for one, or cannot be read."""
    return read_small(path, CONFIG_BYTES if path.name == CONFIG else SMALL_BYTES)


def _check_small_files(folder: Path) -> None:
    """Raise CheckpointError for a pipe, or a file of gigabytes, that transformers would read as a small file."""
    for name, most in READ_BY_LIBRARIES.items():
        path = folder / name
        if path.exists() and not path.is_dir():
            raw = read_small(path, most)
            if path.suffix == ".json":
                refuse_too_many(raw, str(path))


def _by_agreement(folder: Path, files: list[str]) -> tuple[dict[str, Header], dict[str, str]]:
    """Take all files of a folder without an index. Raises CheckpointError if two files hold one tensor."""
    headers = _headers(folder, files)
    homes: dict[str, str] = {}
    for file, header in headers.items():
        for name in header.entries:
            if name in homes:
                raise CheckpointError(
                    f"{folder}: tensor {shown(name)} stands both in {homes[name]} and in {file}, and there is no "
                    f"{INDEX} to say which one counts; remove the file that does not belong to this model"
                )
            homes[name] = file
    return headers, homes


def _by_index(folder: Path) -> tuple[dict[str, Header], dict[str, str]]:
    """Take the files and tensors that the index lists; other tensors in a shard are not part of the model."""
    homes = _weight_map(folder)
    files = sorted(set(homes.values()))
    _refuse_many(folder, "weight files", len(files), MAX_SHARDS)
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of the {len(files)} shards that {INDEX} names are missing: {_some(missing)}; "
            "an interrupted download? Download the model again, finished files are kept"
        )
    headers = _headers(folder, files)
    for name, file in homes.items():
        if name not in headers[file].entries:
            raise CheckpointError(
                f"{folder}: {INDEX} says that tensor {shown(name)} is in {file}, but it is not; index and shards come "
                "from different versions of the model, download it again"
            )
    return headers, homes


def _headers(folder: Path, files: list[str]) -> dict[str, Header]:
    """Read the headers of weight files. Raises CheckpointError for more files or tensors than a model has."""
    _refuse_many(folder, "weight files", len(files), MAX_SHARDS)
    headers, tensors = dict[str, Header](), 0
    for file in files:
        headers[file] = read_header(folder / file)
        tensors += len(headers[file].entries)
        _refuse_many(folder, "tensors", tensors, MAX_TENSORS)
    nbytes = sum(header.size - header.data_start for header in headers.values())
    if nbytes < LEAST_BYTES * (tensors - FEW_TENSORS):
        raise CheckpointError(
            f"{folder}: {tensors:,} tensors, and {nbytes:,} bytes for all of them; a model of more than "
            f"{FEW_TENSORS:,} tensors has far larger ones, so this is no model"
        )
    return headers


def _refuse_many(folder: Path, what: str, count: int, most: int) -> None:
    if count > most:
        raise CheckpointError(
            f"{folder}: {count:,} {what} or more; the largest models have far fewer than {most:,}, so this is no model"
        )


def _weight_map(folder: Path) -> dict[str, str]:
    """Read the index's weight_map, tensor name -> file name. Raises CheckpointError for a file outside the folder."""
    path = folder / INDEX
    homes = parse_object(read_bytes(path), str(path)).get("weight_map")
    if not isinstance(homes, dict) or not homes or not all(isinstance(file, str) for file in homes.values()):
        raise CheckpointError(f"{path}: no weight_map of tensor names to file names; download the index again")
    for name, file in homes.items():
        if not _stays_inside(file):
            raise CheckpointError(
                f"{path}: tensor {shown(name)} is said to be in {shown(file)}, which is outside of the model folder; "
                "such an index is refused"
            )
    return homes


def _stays_inside(file: str) -> bool:
    """Whether a path stays in its folder. Links are allowed, because Hugging Face's cache is made of them."""
    plain = PurePosixPath(file)
    return bool(plain.name) and file.isprintable() and not ("\\" in file or plain.is_absolute() or ".." in plain.parts)


def _no_weights(folder: Path) -> str:
    """The message for a folder without *.safetensors."""
    pickles = sorted({path.name for pattern in PICKLES for path in folder.glob(pattern)})
    if not pickles:
        return f"{folder}: has a {CONFIG} but no *.safetensors; an interrupted download? Download the model again"
    return (
        f"{folder}: only pickled weights ({_some(pickles)}), which can run code when they are loaded, so Bitwright "
        "does not read them; convert them once, if you trust where they come from:\n"
        f"  model = transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r}, use_safetensors=False)\n"
        f"  model.save_pretrained({str(folder) + '-safetensors'!r})"
    )


def _some(names: list[str]) -> str:
    """At most eight names, and how many more there are."""
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more
