"""What all tests share: tiny random Llama checkpoints, as transformers itself writes them, and a place for the rest."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file, save_file
from torch import Tensor

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from bitwright.evaluation.measure import Measurement

# The same examples every time, and no limit per example: tests are to fail for what the code does, not by chance or
# because the machine is busy.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

VOCABULARY, HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 256, 64, 192, 2, 4, 2, 16
SHARED = Path(__file__).resolve().parents[2] / "shared"

Checkpoints = Callable[..., Path]
TIMINGS = "bitwright-timings.json"
LETTERS = "the quick brown fox jumps over the lazy dog, 0123456789 times; "


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """``tiny(dtype="bfloat16", tied=False, shards=False, **config)``: a model folder, made once; nobody writes to it.

    Llama with two layers, grouped heads 4/2 and one token per byte; weights large enough for logits to differ.
    """
    made: dict[str, Path] = {}

    def checkpoint(dtype: str = "bfloat16", tied: bool = False, shards: bool = False, **config: Any) -> Path:
        key = repr((dtype, tied, shards, sorted(config.items())))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("tiny") / "model"
            _save_model(made[key], dtype, tied, shards, config)
            save_tokenizer(made[key])
        return made[key]

    return checkpoint


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of larger models and texts beside the repository, where there is one."""
    if not SHARED.is_dir():
        pytest.skip(f"no folder {SHARED.name}/ beside the repository")
    return SHARED


def changed(folder: Path, place: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a folder with other tensors."""
    copy = Path(shutil.copytree(folder, place))
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 6400 bytes, which are as many tokens."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(LETTERS[n % 63 :] + LETTERS[: n % 63] for n in range(102))[:6400])
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file of a result by name, save the one file that holds the clock."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != TIMINGS]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def measured(
    folder: Path,
    text: Path | str | None = None,
    *,
    seqlen: int | None = None,
    windows: int | None = None,
    reference: Path | str | None = None,
) -> "Measurement":
    """What ``bitwright.evaluate`` measures of a folder on a text, None: the embedded one."""
    import bitwright

    asked = None if text is None else str(text)
    found = bitwright.evaluate(folder, asked, seqlen=seqlen, windows=windows, reference=reference).measurement
    assert found is not None
    return found


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> "PreTrainedModel":
    """The model as transformers loads it."""
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.eval()
    return model


def loaded_with_info(folder: Path, dtype: torch.dtype | str = "auto") -> "tuple[PreTrainedModel, dict[str, Any]]":
    """The model as transformers loads it, and what was missing, unexpected or of another shape."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    return cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)  # its annotation knows of the model alone


def _save_model(folder: Path, dtype: str, tied: bool, shards: bool, changes: dict[str, Any]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": None,
        "use_cache": True,
    }
    model = LlamaForCausalLM(LlamaConfig(**(settings | changes)))
    generator = torch.Generator().manual_seed(2024)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.2 * drawn)
            elif parameter.dim() == 1:
                parameter.copy_(0.3 * drawn)
            else:
                parameter.copy_(drawn * (0.5 if "embed" in name else 1.4 / parameter.shape[1] ** 0.5))
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="100KB" if shards else "5GB")


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer of one token per byte: no merges, so that a text's tokens can be counted by hand."""
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=_bytes()).save_pretrained(folder)


def byte_tokenizer(around: str, *, eos: bool = True) -> "PreTrainedTokenizerFast":
    """A tokenizer of one token per byte, ``<s>`` 256 and ``</s>`` 257; ``around`` is what it puts around a text.

    ``around`` is "<s> $A" for a BOS in front.
    """
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = _bytes()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    ends = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=ends)
    named = {"bos_token": "<s>"} | ({"eos_token": "</s>"} if eos else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def _bytes() -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
