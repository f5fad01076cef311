"""The model to work on, opened and checked: everything that can be refused is refused here, before any long work."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from bitwright.calibration.texts import read_text
from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.block import Family
from bitwright.core.errors import CalibrationError, CheckpointError, RecipeError, UserError, nearest
from bitwright.core.registry import find, names
from bitwright.demo import texts

BUILTIN = "builtin"
DEFAULT_SEQLEN = 2048
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Source:
    """A full-precision model on disk, of an architecture that a file in ``families/`` describes."""

    checkpoint: Checkpoint
    config: PretrainedConfig
    family: Family

    @classmethod
    def open(cls, folder: Path) -> "Source":
        """Raises CheckpointError or RecipeError for what cannot be quantized."""
        checkpoint = open_checkpoint(folder)
        if "quantization_config" in checkpoint.config:
            how = checkpoint.config["quantization_config"]
            method = how.get("quant_method", "an unknown method") if isinstance(how, dict) else "an unknown method"
            raise CheckpointError(f"{folder} is quantized already ({method}); start from the full-precision model")
        model_type = str(checkpoint.config.get("model_type", ""))
        if model_type not in names("families"):
            raise RecipeError(
                f"{folder}: nobody has described the architecture '{model_type}' to Bitwright yet; "
                f"{nearest(model_type, names('families'))}. One short file in families/ describes a new one"
            )
        config = model_config(folder)
        family: Family = find("families", model_type).describe(config)
        require_tokenizer(folder)
        return cls(checkpoint, config, family)


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in a local folder; a name of the hub is told how to become one."""
    if not folder.exists() and len(folder.parts) <= 2 and not folder.is_absolute():
        raise CheckpointError(
            f"there is no folder {folder}; Bitwright reads local folders. If that is a model of the Hugging Face hub, "
            f"download it first: hf download {folder} --local-dir {folder.name}"
        )
    return Checkpoint.open(folder)


def model_config(folder: Path) -> PretrainedConfig:
    """The configuration as transformers reads it, offline and without remote code."""
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers validates with several libraries, each with its own exceptions
        raise CheckpointError(f"{folder}/config.json: transformers cannot read it: {error}") from error
    return config


def require_tokenizer(folder: Path) -> None:
    """Raises CheckpointError where no tokenizer file is in the folder."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(
            f"{folder} has no tokenizer: none of {', '.join(TOKENIZER_FILES)} is there. Copy the tokenizer's files "
            "from the original repository into the folder; a model is of no use without them"
        )


def tokenize(folder: Path, text: str) -> Int[Tensor, " M"]:
    """The whole text tokenized once, without special tokens of a sentence's ends beyond the tokenizer's own."""
    require_tokenizer(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exception for a broken file
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {error}") from error
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    return torch.as_tensor(ids, dtype=torch.int64)


def text_of(source: str, purpose: str) -> str:
    """The text behind ``--calibration`` or ``--text``; ``builtin`` is the embedded model's."""
    if source == BUILTIN:
        return texts.calibration_text() if purpose == "calibration" else texts.evaluation_text()
    text = read_text(source)
    if not text.strip():
        raise CalibrationError(f"'{source}' holds no text: it is empty")
    return text


def sequence_length(asked: int | None, config: Any, default: int = DEFAULT_SEQLEN) -> int:
    """The length asked for, or the default where the model allows it. Raises RecipeError past the model's maximum."""
    longest = getattr(config, "max_position_embeddings", None)
    if asked is None:
        return min(default, longest) if longest else default
    if longest is not None and asked > longest:
        raise RecipeError(f"--seqlen {asked} is longer than the model's own maximum of {longest} tokens")
    return asked


def pick_device(name: str) -> torch.device:
    """``auto`` is the first GPU where there is one. Raises UserError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{name}' cannot be used ({error}); use auto, cpu, or cuda:0") from None
    return device


def pick_dtype(name: str, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """``auto`` computes in float32 on a CPU and in the checkpoint's dtype elsewhere."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else stored
    if name not in DTYPES:
        raise UserError(f"there is no dtype '{name}'; {nearest(name, [*DTYPES, 'auto'])}")
    return DTYPES[name]
