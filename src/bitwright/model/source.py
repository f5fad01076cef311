"""Open and check the model to work on, and refuse what can be refused before any long work."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from bitwright.calibration.tokenizer import Tokenizer
from bitwright.checkpoint.bounded_tokenizer import BoundedTokenizer
from bitwright.checkpoint.layout import read_bytes
from bitwright.checkpoint.reader import Checkpoint
from bitwright.checkpoint.sidecar_files import AGAIN, TOKENIZER, read_tokenizer_config
from bitwright.checkpoint.untied import TIED
from bitwright.core.block import Family
from bitwright.core.decoder import Decoder, OddConfigError
from bitwright.core.errors import CheckpointError, RecipeError, UserError, in_shell, nearest, shown
from bitwright.core.registry import architecture_of
from bitwright.core.small_files import parse_object
from bitwright.formats import refuse_engine_file
from bitwright.model import hub
from bitwright.model.config import model_config, text_config_of
from bitwright.model.fitting import require_fitting
from bitwright.model.plain_config import plain_decoder
from bitwright.model.quantized_original import DequantizedCheckpoint, as_dense

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DEFAULT_SEQLEN = 2048
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Source:
    """A model on disk, in full precision or read as if it were.

    ``family`` is None for an architecture without a description. ``config`` is transformers'; it is None for such an
    architecture, and if there is a ``decoder``, which was read from a plain config.json without transformers.
    """

    checkpoint: Checkpoint
    model_type: str
    config: "PretrainedConfig | None"
    family: Family | None
    decoder: Decoder | None = None

    @classmethod
    def open(cls, folder: Path, *, to_build: bool = True, tokenizer: bool = True) -> "Source":
        """Open a model. Raises CheckpointError or RecipeError for what cannot be quantized.

        If no model will be built (``to_build``), transformers does not read a plain config.json. Without ``tokenizer``,
        the folder need not have a tokenizer.
        """
        checkpoint = open_original(folder)
        folder, model_type = checkpoint.folder, _model_type(checkpoint)
        if tokenizer:
            require_tokenizer(folder)
        require_fitting(checkpoint)
        architecture = architecture_of(model_type)
        decoder = None if to_build or architecture is None else plain_decoder(checkpoint.config, architecture)
        if architecture is not None and architecture.family is not None and decoder is not None:
            _check_blocks(checkpoint, decoder.blocks)
            return cls(checkpoint, model_type, None, architecture.family(checkpoint.config), decoder)
        known = architecture is not None and architecture.family is not None
        if not (known or to_build):
            return cls(checkpoint, model_type, None, None)
        if to_build:
            _require_known(checkpoint, model_type)
        config = model_config(checkpoint)
        if checkpoint.config.get(TIED) is False:  # also if the weights say so, and config.json does not
            config.tie_word_embeddings = False
        _check_blocks(checkpoint, getattr(text_config_of(config), "num_hidden_layers", 1))
        with blaming_the_config(folder):
            family = architecture.family(config.to_dict()) if architecture and architecture.family else None
            decoder = architecture.decoder(config.to_dict()) if architecture and architecture.decoder else None
        return cls(checkpoint, model_type, config, family, decoder)

    def to_build(self) -> "PretrainedConfig":
        """The config, to build the model. Raises RecipeError for a model that has no blocks to go through."""
        config = model_config(self.checkpoint) if self.config is None else self.config
        if getattr(config, "is_encoder_decoder", False):
            raise RecipeError(
                f"{self.checkpoint.folder}: '{self.model_type}' is an encoder with a decoder, and methods with "
                "calibration data go through decoder-only models. --method rtn or --method easyquant, without "
                "--calibration, quantize its matrices one by one"
            )
        return config

    @property
    def note(self) -> str | None:
        """How the original was quantized; None if it was not."""
        return self.checkpoint.note if isinstance(self.checkpoint, DequantizedCheckpoint) else None

    @property
    def longest(self) -> int | None:
        """The largest number of tokens that the model takes; None if its config does not say."""
        if self.decoder is not None:
            return self.decoder.context
        return None if self.config is None else getattr(text_config_of(self.config), "max_position_embeddings", None)


def family_of(folder: Path) -> Family | None:
    """Find the family of the model in a folder; None for an architecture without one. Raises CheckpointError."""
    checkpoint = open_checkpoint(folder)
    architecture = architecture_of(_model_type(checkpoint))
    if architecture is None or architecture.family is None:
        return None
    config = model_config(checkpoint)
    with blaming_the_config(folder):
        return architecture.family(config.to_dict())


@contextmanager
def blaming_the_config(folder: Path) -> Iterator[None]:
    """A context that turns the exceptions from impossible numbers in config.json into CheckpointError."""
    try:
        yield
    except OddConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    except UserError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{folder}/config.json describes no model that can be built: {type(error).__name__}: {error}. Compare it "
            "with the original repository's, or download it again"
        ) from error


def _model_type(checkpoint: Checkpoint) -> str:
    model_type = checkpoint.config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise CheckpointError(
            f"{checkpoint.folder}/config.json does not say which architecture this is: its model_type is "
            f"{model_type!r}; is it the config.json of a transformers model?"
        )
    return model_type


def _require_known(checkpoint: Checkpoint, model_type: str) -> None:
    """Raise RecipeError for an architecture that the installed transformers has no code for."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type in CONFIG_MAPPING:
        return
    written = checkpoint.config.get("transformers_version")
    close = get_close_matches(model_type, list(CONFIG_MAPPING), n=1)
    meant = f"; did you mean {close[0]}?" if close else "."
    newer = f" (config.json was written with {shown(written)[1:-1]})" if isinstance(written, str) else ""
    what = f"transformers {transformers.__version__} has no architecture {shown(model_type)}{newer}{meant}"
    raise RecipeError(
        f"{checkpoint.folder}: {what} "
        "Update transformers, or correct model_type. Code from the model's folder is not run. Methods that need no "
        "model quantize any checkpoint: --method rtn or --method easyquant, without --calibration"
    )


def _check_blocks(checkpoint: Checkpoint, blocks: int) -> None:
    """Raise CheckpointError for an impossible number of blocks, before transformers builds them all."""
    tensors = len(checkpoint.names)
    if not 1 <= blocks <= tensors:
        raise CheckpointError(
            f"{checkpoint.folder}/config.json asks for {blocks} blocks (num_hidden_layers), and the weight files hold "
            f"{tensors} tensors in all; the weights belong to another configuration, download both again"
        )


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open the checkpoint in a folder (``find_folder``), its headers checked. Raises CheckpointError."""
    return Checkpoint.open(find_folder(folder))


def open_original(folder: Path) -> Checkpoint:
    """Open an original; if it is quantized, its weights are dequantized as they are read. Raises CheckpointError."""
    return as_dense(open_checkpoint(folder))


def find_folder(folder: Path) -> Path:
    """The folder of a model: this one, or, if there is none and it is a name, that model in the hub's local cache.

    Nothing is downloaded. Raises CheckpointError for a path that cannot be a folder, for a file or folder that only an
    engine reads, and for a name that the cache lacks.
    """
    try:
        missing = not folder.exists()
        folder.resolve()
        refuse_engine_file(folder)
    except (OSError, RuntimeError, ValueError) as error:  # a name that is too long, links in a circle
        raise CheckpointError(f"{folder}: cannot be the folder of a model: {error}; check the path") from None
    if not missing or len(folder.parts) > 2 or folder.is_absolute() or folder.parts[0] in (".", "..", "~"):
        return folder
    by_hand = f"hf download {in_shell(folder)} --local-dir {in_shell(folder.name)}"
    if not hub.is_name(folder):
        raise CheckpointError(f"there is no folder {folder}. If that is a model of the hub, download it: {by_hand}")
    if (snapshot := hub.cached(folder.as_posix())) is not None:
        return snapshot
    raise CheckpointError(
        f"there is no folder {folder}, and no whole model of that name in the cache of the Hugging Face hub. If it is "
        f"a model of the hub, --download fetches it (in Python: bitwright.download); or do so yourself: {by_hand}"
    )


def require_tokenizer(folder: Path) -> None:
    """Raise CheckpointError if no tokenizer file is in the folder, or if one is clearly broken."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(
            f"{folder} has no tokenizer: none of {', '.join(TOKENIZER_FILES)} is there. Copy the tokenizer's files "
            "from the original repository into the folder; a model is of no use without them"
        )
    if (folder / TOKENIZER).is_file():
        _require_model(folder / TOKENIZER)
    read_tokenizer_config(folder)


def _require_model(path: Path) -> None:
    """Raise CheckpointError for a file that is clearly no tokenizer, because the result would get a copy of it."""
    if not isinstance(parse_object(read_bytes(path), str(path)).get("model"), dict):
        raise CheckpointError(
            f"{path}: no tokenizer of the tokenizers library: it has no key 'model' with an object; {AGAIN}"
        )


def open_tokenizer(folder: Path) -> Tokenizer:
    """Open the tokenizer in a folder, offline, without remote code, and within bounds. Raises CheckpointError."""
    require_tokenizer(folder)
    return Tokenizer(BoundedTokenizer(folder), folder)


def check_vocabulary(tokens: Int[Tensor, " M"], config: Any, folder: Path) -> None:
    """Raise UserError for tokens for which the model's embedding has no row."""
    size, largest = config.vocab_size, int(tokens.max()) if tokens.numel() else 0
    if largest >= size:
        raise UserError(
            f"the tokenizer in {folder} gives token {largest}, but the model's embedding has {size} rows; the "
            "tokenizer belongs to another model, copy the right one into the folder"
        )


def sequence_length(asked: int | None, longest: int | None, default: int = DEFAULT_SEQLEN) -> int:
    """Choose the length that was asked for, else the default, or the model's maximum if that is shorter.

    Raises RecipeError if more than the maximum was asked for.
    """
    if longest is not None and longest <= 0:
        longest = None  # 0 and -1 stand for "no maximum" in some configs
    if asked is None:
        return min(default, longest) if longest else default
    if longest is not None and asked > longest:
        raise RecipeError(f"--seqlen {asked} is longer than the model's own maximum of {longest} tokens; ask for less")
    return asked


def pick_device(name: str) -> torch.device:
    """The device of a name; ``auto`` is the first GPU if there is one. Raises UserError if there is no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"there is no device '{name}'; {nearest(name, ('auto', 'cpu', 'cuda', 'cuda:0'))}") from None
    try:
        float(torch.zeros(1, device=device))  # read as well: a tensor on meta can be made, but not read
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition(". ")[0]  # the rest is advice to torch's own developers
        raise UserError(f"device '{name}' cannot be used here ({reason}); use auto, cpu, or cuda:0") from None
    return device


def pick_dtype(name: str, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """The dtype of a name; ``auto`` is float32 on a CPU, and the checkpoint's dtype elsewhere. Raises UserError."""
    if name == "auto":
        if device.type == "cpu":
            return torch.float32
        return stored if stored in DTYPES.values() else torch.bfloat16  # FP8 is stored, not computed in
    if name not in DTYPES:
        raise UserError(f"there is no dtype '{name}'; {nearest(name, [*DTYPES, 'auto'])}")
    return DTYPES[name]
