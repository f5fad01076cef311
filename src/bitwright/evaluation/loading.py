"""Load a folder as a transformers model, as its users do: offline, without remote code.

Folders that transformers alone cannot load (gptq and awq, which it leaves to gptqmodel) are read by Bitwright and made
dense.
"""

from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from bitwright.checkpoint.account_file import read_account
from bitwright.core.errors import CheckpointError, SchemeError
from bitwright.core.grid import Grid
from bitwright.core.registry import format_of, names
from bitwright.core.scheme import Scheme
from bitwright.formats import QuantizedFolder, is_made_dense
from bitwright.model.source import open_checkpoint, pick_device, pick_dtype
from bitwright.steps.activations import quantize_activations, quantize_attention

TRANSFORMERS, BITWRIGHT = "transformers", "bitwright"
"""Who loads a folder."""


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to run, and who loaded it: "transformers", or "bitwright" if it took our own decoding."""

    model: PreTrainedModel
    loader: str


def load(folder: Path | str, *, device: str = "auto", dtype: str = "auto") -> PreTrainedModel:
    """Load the model in a folder, original or quantized, ready to run; offline, no remote code.

    Plain transformers loads it, the bitwright format through our plugin: packed weights stay packed in memory. Folders
    that it does not load (gptq, awq) are read by Bitwright and dense in memory. Queries that the folder's config leaves
    out are quantized on top (``W4A8KV4``).
    ``dtype`` "auto" is the checkpoint's own if the device is fast with it. Raises CheckpointError.
    """
    return load_with_loader(Path(folder), device=device, dtype=dtype).model


def load_with_loader(folder: Path, *, device: str = "auto", dtype: str = "auto") -> Loaded:
    """Load a folder by transformers, or by our own decoding of its codes if transformers does not load the format.

    Raises CheckpointError for what cannot be loaded so.
    """
    where, checkpoint = pick_device(device), open_checkpoint(folder)
    if is_made_dense(checkpoint):
        return _load_decoded(folder, device, dtype)
    model = load_model(folder, pick_dtype(dtype, where, checkpoint.dtype_of_weights), where)
    queries = left_out(folder)
    quantize_attention(model, queries, None)
    return Loaded(model, TRANSFORMERS if queries is None else BITWRIGHT)


def _load_decoded(folder: Path, device: str, dtype: str) -> Loaded:
    """Load a quantized folder by our own reading of its codes, dense. Raises CheckpointError."""
    where, model = pick_device(device), QuantizedFolder.open(folder)
    if model.described is None:
        raise CheckpointError(f"{folder} is not quantized")
    decoded = _decoded(model, pick_dtype(dtype, where, model.checkpoint.dtype_of_weights), where)
    quantize_attention(decoded, left_out(folder), None)
    return Loaded(decoded, BITWRIGHT)


def left_out(folder: Path) -> Grid | None:
    """The grid of the queries if the folder's config could not hold it; None otherwise."""
    account = read_account(folder)
    if account is None or account.format not in names("formats"):
        return None
    try:
        return format_of(account.format).queries_left_out(Scheme.parse(account.scheme))
    except SchemeError:
        return None


def load_codes(model: QuantizedFolder) -> PreTrainedModel:
    """Load a quantized folder by our own reading of its codes: dense, in float32, on the CPU.

    Activations and KV cache are quantized as the folder says. Raises CheckpointError.
    """
    return _decoded(model, torch.float32, torch.device("cpu"))


def _decoded(model: QuantizedFolder, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    loaded, described = load_model(model.folder, dtype, device, dense_tensors(model, dtype)), model.described
    if described is not None:
        quantize_activations(loaded, described.activations, described.kv, model.linears)
    return loaded


def dense_tensors(model: QuantizedFolder, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor of a quantized folder by its name in an ordinary one.

    Linears are ``(code - zero) * scale``, computed in float32 and given in ``dtype``. Raises CheckpointError.
    """
    tensors = {name: model.tensor(name) for name in model.passed}
    for name in model.linears:
        tensors[f"{name}.weight"] = model.read(name).dequantize(torch.float32).to(dtype)
    return tensors


def load_model(
    folder: Path, dtype: torch.dtype, device: torch.device, tensors: Mapping[str, Tensor] | None = None
) -> PreTrainedModel:
    """Load a model from a folder, or from ``tensors`` if given, with its weights (and scales) in ``dtype``.

    Raises CheckpointError if transformers refuses it, and if weights are missing: transformers would go on with random
    ones.
    """
    logging.disable_progress_bar()
    try:
        with redirect_stderr(StringIO()):  # compressed-tensors shows a bar per model that cannot be switched off
            loaded, report = _from_folder(folder, dtype) if tensors is None else _from_tensors(folder, dtype, tensors)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged folder ends in whatever the libraries trip over
        raise CheckpointError(f"transformers cannot load {folder}: {type(error).__name__}: {error}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{folder} has no weights for {missing[0]} and {len(missing) - 1} others; transformers would make them up. "
            "Quantize the model again, or download the folder again"
        )
    loaded.eval()
    torch.nn.Module.to(loaded, device)
    if hasattr(loaded, "ct_decompress_hook"):  # the first forward pass decompresses, with a bar of its own
        with redirect_stderr(StringIO()), torch.inference_mode():
            loaded(torch.zeros(1, 1, dtype=torch.int64, device=device))
    return loaded


def _from_folder(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """The model in a folder, and transformers' report on the loading."""
    kind: Any = AutoModelForCausalLM
    loaded: tuple[PreTrainedModel, Mapping[str, Any]] = kind.from_pretrained(
        folder,
        dtype=dtype,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    return loaded


def _from_tensors(
    folder: Path, dtype: torch.dtype, tensors: Mapping[str, Tensor]
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """A model of tensors in memory, by the folder's config without its quantization_config, and the report."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    loaded: tuple[PreTrainedModel, Mapping[str, Any]] = kind.from_pretrained(
        None, config=config, state_dict=dict(tensors), dtype=dtype, output_loading_info=True
    )
    if (folder / "generation_config.json").is_file():
        loaded[0].generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return loaded
