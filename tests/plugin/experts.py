"""Tiny mixture-of-experts models as transformers saves them, and the same quantized tensor by tensor."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel

from bitwright.core.decisions import LinearDecision
from bitwright.core.grid import Tile
from bitwright.core.qtensor import QTensor
from bitwright.core.quantized import Departure, WrittenModel
from bitwright.core.scheme import Scheme
from bitwright.families import llama
from bitwright.formats import bitwright as format
from bitwright.formats import dense
from bitwright.steps.apply import quantize_linear

SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": False, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": None, "num_experts_per_tok": 2,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16},
    "GptOss": {"num_local_experts": 4, "head_dim": 16},
    "Llama4": {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 96, "head_dim": 16,
               "interleave_moe_layer_step": 1},
    "GraniteMoe": {"num_local_experts": 4},
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {"Llama": {}, "GPTNeoX": {}}
"""Models without experts."""
CONFIGS = {"Llama4": "Llama4TextConfig"}
EXPERT = re.compile(r"experts\.(\d+)\.")
LINEAR = re.compile(r"(_proj|\.w[123]|put_linear|embed_out|query_key_value|attention.dense|dense_\w+)(\.weight)?$")


@dataclass(frozen=True)
class Folders:
    """One quantized model, packed and dense; ``weights`` are what was packed, by the tensors' names."""

    packed: Path
    dense: Path
    weights: dict[str, list[QTensor]]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The packed folder's tensors."""
        return load_file(self.packed / "model.safetensors")

    @property
    def config(self) -> dict[str, Any]:
        """The packed folder's quantization_config."""
        found: dict[str, Any] = json.loads((self.packed / "config.json").read_text())["quantization_config"]
        return found

    def change(self, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
        """Has tensors and quantization_config of the packed folder changed."""
        tensors, whole = self.tensors, json.loads((self.packed / "config.json").read_text())
        change(tensors, whole["quantization_config"])
        save_file(tensors, self.packed / "model.safetensors", metadata={"format": "pt"})
        (self.packed / "config.json").write_text(json.dumps(whole))


def save_original(model: str, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """A random model, its tensors named and laid out as those of the published ones."""
    config = getattr(transformers, CONFIGS.get(model, f"{model}Config"))(**(SIZES | (MODELS | OTHERS)[model]))
    made: PreTrainedModel = getattr(transformers, f"{model}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * drawn if "norm" in name else drawn * (0.3 if "bias" in name else 0.12))
    nn.Module.to(made, dtype).save_pretrained(folder)


def quantized(model: str, scheme: str, outliers: bool, tmp_path: Path, dtype: torch.dtype = torch.float32) -> Folders:
    """The model quantized tensor by tensor, every other weight in groups along the other dimension; with outliers, all
    but the attention and experts 1 have some."""
    save_original(model, tmp_path / "original", dtype)
    whole = load_file(tmp_path / "original" / "model.safetensors")
    asked = Scheme.parse(scheme)
    weights = {name: _quantize(name, tensor, asked, outliers) for name, tensor in whole.items() if LINEAR.search(name)}
    kept = {name: tensor for name, tensor in whole.items() if name not in weights}
    for room, to in ((format, tmp_path / "packed"), (dense, tmp_path / "dense")):
        tensors = dict(kept)
        for name, slices in weights.items():
            stacked = whole[name].dim() == 3
            x = name.removesuffix(".weight")
            tensors |= room.encode_stacked(name, slices) if stacked else room.encode(x, slices[0])
        write(tmp_path / "original", to, tensors, None if room is dense else _config(asked, weights, kept, dtype))
    return Folders(tmp_path / "packed", tmp_path / "dense", weights)


def _quantize(name: str, tensor: Tensor, scheme: Scheme, outliers: bool) -> list[QTensor]:
    turned = re.search(r"w1|gate_proj|up_proj|q_proj|output_linear", name) is not None
    tile = Tile(32, 1) if turned else Tile(1, 32)
    slices = tensor if tensor.dim() == 3 else tensor[None]
    numbers = range(len(slices)) if tensor.dim() == 3 else [int(m[1]) if (m := EXPERT.search(name)) else 1]
    masks = [w.abs() > 2.5 * w.std() if outliers and e != 1 else None for e, w in zip(numbers, slices, strict=True)]
    pairs = zip(slices, masks, strict=True)
    return [quantize_linear(w, LinearDecision(tile=tile, outliers=mask), scheme, w.dtype) for w, mask in pairs]


def _config(
    scheme: Scheme, weights: dict[str, list[QTensor]], kept: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Any] | None:
    departures = {}
    for name, slices in weights.items():
        outliers = sum(0 if q.outlier_index is None else len(q.outlier_index) for q in slices)
        if outliers or slices[0].tile != scheme.tile:
            departures[name.removesuffix(".weight")] = Departure(slices[0].tile.size(slices[0].shape), outliers)
    written = WrittenModel(scheme, llama.family(LlamaConfig().to_dict()), dtype, departures=departures)
    names = [name.removesuffix(".weight") for name, tensor in kept.items() if tensor.dim() == 2]
    config = format.quantization_config(written)
    return None if config is None else config | {"modules_to_not_convert": names}


def write(original: Path, folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None) -> None:
    """A copy of a folder with these tensors and this quantization_config."""
    shutil.copytree(original, folder)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        whole = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(whole | {"quantization_config": config}))
