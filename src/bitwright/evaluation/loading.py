"""Load a folder as a transformers model, as its users do: offline, without remote code.

Transformers alone cannot load gptq and awq, for which it needs gptqmodel. Such folders are read by Bitwright, and their
weights are dequantized. So are those of originals in FP8.
"""

from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from bitwright.checkpoint.account_file import read_account
from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.errors import CheckpointError, SchemeError, shown
from bitwright.core.grid import Grid
from bitwright.core.import_path import KERNELS
from bitwright.core.registry import format_of, names
from bitwright.core.scheme import Scheme
from bitwright.formats import CONFIG, QuantizedFolder, is_made_dense, is_read
from bitwright.model.config import read_config, text_config_of, without_hub_kernels
from bitwright.model.fitting import built_within, require_fitting
from bitwright.model.float8 import DENSE, is_float8
from bitwright.model.quantized_original import as_dense
from bitwright.model.source import open_checkpoint, pick_device, pick_dtype
from bitwright.model.view import ModelView, class_of, with_stacks
from bitwright.steps.activations import quantize_activations, quantize_attention, quantize_inputs

TRANSFORMERS, BITWRIGHT = "transformers", "bitwright"
"""The names of the loaders."""


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to run, and its loader: "transformers", or "bitwright" if Bitwright had to decode it."""

    model: PreTrainedModel
    loader: str


def load(folder: Path | str, *, device: str = "auto", dtype: str = "auto") -> PreTrainedModel:
    """Load the model in a folder, original or quantized, ready to run; offline, no remote code.

    Transformers loads it, with our plugin for the bitwright format, whose weights stay packed in memory. Folders that
    transformers does not load (gptq, awq), or the installed release loads wrong, are read by Bitwright and become
    dense. If a scheme such as ``W4A8KV4``
    quantizes queries that the folder's config leaves out, they are quantized too. ``dtype`` "auto" is the checkpoint's
    own on a GPU, and float32 on a CPU. Raises CheckpointError.
    """
    return load_with_loader(Path(folder), device=device, dtype=dtype).model


def load_with_loader(folder: Path, *, device: str = "auto", dtype: str = "auto") -> Loaded:
    """Load a folder with transformers, or decode its codes ourselves if transformers does not load the format.

    Raises CheckpointError for a folder that cannot be loaded.
    """
    where, checkpoint = pick_device(device), open_checkpoint(folder)
    folder = checkpoint.folder
    if is_made_dense(checkpoint):
        return _load_decoded(folder, device, dtype)
    if is_float8(checkpoint.config.get(CONFIG)):
        return _load_float8(checkpoint, pick_dtype(dtype, where, DENSE), where)
    _refuse_kernels(checkpoint)
    model = load_model(folder, pick_dtype(dtype, where, checkpoint.dtype_of_weights), where)
    queries = left_out(folder)
    quantize_attention(model, queries, None)
    return Loaded(model, TRANSFORMERS if queries is None else BITWRIGHT)


def _refuse_kernels(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for a method whose linears may fetch kernels from the hub when they compute."""
    quantization = checkpoint.config.get(CONFIG)
    if quantization is not None and not is_read(checkpoint) and find_spec(KERNELS) is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise CheckpointError(
            f"{checkpoint.folder} is quantized by {shown(method)}, for which transformers may fetch code from the hub "
            f"with the package {KERNELS} and run it; do without that package here, or use the command bitwright, which "
            "does not look at it"
        )


def _load_float8(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Loaded:
    """Load an original in FP8 with its weights dequantized, whatever the device. Raises CheckpointError."""
    original = as_dense(checkpoint)
    tensors = {name: original.read(name) for name in original.names}
    return Loaded(load_model(checkpoint.folder, dtype, device, tensors), BITWRIGHT)


def _load_decoded(folder: Path, device: str, dtype: str) -> Loaded:
    """Load a quantized folder by decoding its codes ourselves; it becomes dense. Raises CheckpointError."""
    where, model = pick_device(device), QuantizedFolder.open(folder)
    if model.described is None:
        raise CheckpointError(f"{folder} is not quantized")
    dtype_of_model = pick_dtype(dtype, where, model.checkpoint.dtype_of_weights)
    decoded, described = (
        load_model(folder, dtype_of_model, where, dense_tensors(model, dtype_of_model)),
        model.described,
    )
    quantize_inputs(decoded, described.activations, model.linears)
    quantize_attention(decoded, described.kv if described.queries else left_out(folder), described.kv)
    return Loaded(decoded, BITWRIGHT)


def left_out(folder: Path) -> Grid | None:
    """The grid of the queries if the folder's config cannot hold it, else None."""
    account = read_account(folder)
    if account is None or account.format not in names("formats"):
        return None
    try:
        return format_of(account.format).queries_left_out(Scheme.parse(account.scheme))
    except SchemeError:
        return None


def load_codes(model: QuantizedFolder, *, rounded: bool = False) -> PreTrainedModel:
    """Load a quantized folder by decoding its codes ourselves: dense, in float32, on the CPU.

    If ``rounded``, weights are computed in the dtype of their scales, as clients that keep them packed do. Activations
    and KV cache are quantized as the folder says. Raises CheckpointError.
    """
    return _decoded(model, torch.float32, torch.device("cpu"), rounded)


def _decoded(
    model: QuantizedFolder, dtype: torch.dtype, device: torch.device, rounded: bool = False
) -> PreTrainedModel:
    loaded, described = load_model(model.folder, dtype, device, dense_tensors(model, dtype, rounded)), model.described
    if described is not None:
        quantize_activations(loaded, described.activations, described.kv, model.linears)
    return loaded


def dense_tensors(model: QuantizedFolder, dtype: torch.dtype, rounded: bool = False) -> dict[str, Tensor]:
    """Every tensor of a quantized folder, dequantized, by its name in an unquantized folder.

    Linears and stacks of experts are ``(code - zero) * scale``, computed in float32 (in the dtype of their scales if
    ``rounded``) and given in ``dtype``. Raises CheckpointError.
    """
    arithmetic = None if rounded else torch.float32
    tensors = {name: model.tensor(name) for name in model.passed}
    for name in model.linears:
        tensors[f"{name}.weight"] = model.read(name).dequantize(arithmetic).to(dtype)
    view = ModelView.of(model.checkpoint, with_stacks(model.stacks)) if model.stacks else None
    for name in model.stacks:
        slices = [part.dequantize(arithmetic).to(dtype) for part in model.slices(name)]
        tensors[name if view is None else view.stack(name)] = torch.stack(slices)
    return tensors


def load_model(
    folder: Path, dtype: torch.dtype, device: torch.device, tensors: Mapping[str, Tensor] | None = None
) -> PreTrainedModel:
    """Load a model from a folder, or from ``tensors`` if given, with its weights (and scales) in ``dtype``.

    Raises CheckpointError if transformers refuses it, and if weights are missing, for which transformers would take
    random ones.
    """
    if tensors is None:
        return _loaded(folder, lambda: _from_folder(folder, dtype), device)
    return _loaded(folder, lambda: _from_tensors(folder, dtype, tensors), device)


def _loaded(
    folder: Path, make: Callable[[], tuple[PreTrainedModel, Mapping[str, Any]]], device: torch.device
) -> PreTrainedModel:
    """Load a model on a device. Raises CheckpointError as ``load_model``."""
    logging.disable_progress_bar()
    checkpoint = open_checkpoint(folder)
    require_fitting(checkpoint)
    try:
        # compressed-tensors shows a bar per model that cannot be switched off
        with built_within(checkpoint), redirect_stderr(StringIO()), without_hub_kernels():
            loaded, report = make()
    except CheckpointError:
        raise
    except Exception as error:  # the libraries raise anything for a damaged folder
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
        with redirect_stderr(StringIO()), torch.no_grad():  # tensors of inference_mode have no gradients, ever
            loaded(torch.zeros(1, 1, dtype=torch.int64, device=device))
    return loaded


def load_as_named(folder: Path) -> PreTrainedModel:
    """Load the model in a folder as the class that its config names, in float32, on the CPU. Raises CheckpointError."""
    kind = class_of(read_config(folder))
    return _loaded(folder, lambda: _from_folder(folder, torch.float32, kind), torch.device("cpu"))


def _from_folder(
    folder: Path, dtype: torch.dtype, kind: Any = AutoModelForCausalLM
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """Load the model in a folder; return it with transformers' report."""
    loaded: tuple[PreTrainedModel, Mapping[str, Any]] = kind.from_pretrained(
        folder,
        config=read_config(folder),
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
    """Load a model from tensors, with the folder's config without quantization_config; return it with the report."""
    config = read_config(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if kind.config_class is not type(config):  # the class of a text model, and the config of a model with others
        config = text_config_of(config)
    loaded: tuple[PreTrainedModel, Mapping[str, Any]] = kind.from_pretrained(
        None, config=config, state_dict=dict(tensors), dtype=dtype, output_loading_info=True
    )
    if (folder / "generation_config.json").is_file():
        loaded[0].generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return loaded
