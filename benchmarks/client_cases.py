"""The folders that the clients are asked to open, how they are made, and what Bitwright says that they compute."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

import bitwright
from bitwright.core.scheme import Scheme
from bitwright.evaluation.loading import load_codes
from bitwright.formats import QuantizedFolder
from bitwright.formats.gguf.blocks import nearest, valued
from bitwright.formats.mlc.presets import AUTOAWQ, PRESETS, Preset, fitted_to

FILES = ("gguf", "mlc")
"""Formats that cannot be read back: they are exported from a folder that can."""
OUTSIDE = ("model.embed_tokens.weight", "lm_head.weight")
"""Weights that these formats quantize too; the second is missing if it is tied to the first."""
EXPORTING, CLIENTS_OWN = ("embeddings",), ("backend",)
"""Keys of settings that are no recipe's."""
Q8_0_BITS = 8.5
WEIGHT_FILES = ("*.safetensors", "*.gguf", "params_shard_*.bin")


@dataclass(frozen=True)
class Case:
    """A folder for a client; ``source`` is the format it is exported from, None if it is quantized into its own.

    ``dtype`` is that of the client's arithmetic. ``settings`` are keys of the recipe, options of the export
    (``EXPORTING``), and options of the client (``CLIENTS_OWN``).
    """

    client: str
    format: str
    scheme: str
    source: str | None = None
    dtype: str = "auto"
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, str | None]:
        """The keys that identify a row."""
        settings = ", ".join(f"{key} {value}" for key, value in self.settings.items())
        named = {"client": self.client, "format": self.format, "scheme": self.scheme, "from": self.source or "model"}
        return named | ({} if self.dtype == "auto" else {"dtype": self.dtype}) | {"settings": settings or None}

    @property
    def options(self) -> dict[str, Any]:
        """The options of the client."""
        return self.among(CLIENTS_OWN)

    def among(self, keys: Collection[str]) -> dict[str, Any]:
        """The settings with these keys."""
        return {key: value for key, value in self.settings.items() if key in keys}


@dataclass(frozen=True)
class CaseFiles:
    """The files of a case: what the client opens, and the folder that says what it should compute.

    ``true_bytes`` is the size of all of its weights without any padding or repetition.
    """

    output: Path
    reference: QuantizedFolder
    bytes_on_disk: int
    true_bytes: float
    bits_per_weight: float
    changed: dict[str, Tensor] = field(default_factory=dict)

    def load(self) -> Any:
        """The model by our own reading of the codes: dense, in float32."""
        model = load_codes(self.reference)
        with torch.no_grad():
            for name, weight in self.changed.items():
                model.get_parameter(name).copy_(weight)
        return model


CT = "compressed-tensors"
FLOAT16: dict[str, Any] = {"dtype": "float16"}
ONE_LEFT: dict[str, Any] = {"settings": {"exclude": "model.layers.1.self_attn.o_proj.weight"}}
OUTPUT_TOO: dict[str, Any] = {"settings": {"quantize_lm_head": True}}
CASES = (
    Case("transformers", CT, "W4A16g128", dtype="float32"),
    Case("transformers", CT, "W3A16g128", dtype="float32"),
    Case("gptqmodel", "gptq", "W4A16g128sym", **FLOAT16),
    Case("gptqmodel", "gptq", "W4A16g128sym", dtype="bfloat16"),
    Case("gptqmodel", "gptq", "W4A16g128sym", CT, **FLOAT16),
    Case("gptqmodel", "gptq", "W4A16g128sym", **FLOAT16, **ONE_LEFT),
    Case("gptqmodel", "gptq", "W4A16g128sym", **FLOAT16, **OUTPUT_TOO),
    Case("gptqmodel", "gptq", "W4A16g128", **FLOAT16),
    Case("gptqmodel", "gptq", "W4A16", **FLOAT16, settings={"backend": "gptq_torch"}),
    Case("gptqmodel", "gptq", "W3A16g128", **FLOAT16),
    Case("gptqmodel", "gptq", "W2A16g128", **FLOAT16),
    Case("gptqmodel", "gptq", "W2A16sym", **FLOAT16),
    Case("gptqmodel", "gptq", "W8A16g128", **FLOAT16),
    Case("gptqmodel", "gptq", "W8A16sym", **FLOAT16),
    Case("gptqmodel", "awq", "W4A16g128", **FLOAT16),
    Case("gptqmodel", "awq", "W4A16g128", dtype="bfloat16"),
    Case("gptqmodel", "awq", "W4A16g128", CT, **FLOAT16),
    Case("gptqmodel", "awq", "W4A16g128", **FLOAT16, **ONE_LEFT),
    Case("gptqmodel", "awq", "W4A16g128", **FLOAT16, **OUTPUT_TOO),
    Case("gptqmodel", "awq", "W4A16g64", **FLOAT16),
    Case("gptqmodel", "awq", "W4A16", **FLOAT16, settings={"backend": "awq_torch"}),
    Case("optimum", "gptq", "W4A16g128sym", **FLOAT16),
    Case("optimum", "gptq", "W2A16g128", **FLOAT16),
    Case("optimum", "gptq", "W8A16sym", **FLOAT16),
    Case("optimum", "awq", "W4A16g128", **FLOAT16),
    Case("llamacpp", "gguf", "W4A16g32", "bitwright"),
    Case("llamacpp", "gguf", "W4A16g32sym", "bitwright"),
    Case("llamacpp", "gguf", "W4A16g32sym", CT),
    Case("llamacpp", "gguf", "W4A16g128", "bitwright"),
    Case("llamacpp", "gguf", "W2A16g64", "bitwright"),
    Case("llamacpp", "gguf", "W3A16g128", "bitwright"),
    Case("llamacpp", "gguf", "W5A16g64", "bitwright"),
    Case("llamacpp", "gguf", "W8A16g32sym", "bitwright"),
    Case("tvm", "mlc", "mlc:q4f16_1", "bitwright"),
    Case("tvm", "mlc", "mlc:q4f16_1", "bitwright", settings={"embeddings": "f16"}),
    Case("tvm", "mlc", "mlc:q3f16_1", "bitwright"),
    Case("tvm", "mlc", "mlc:q2f16_1", "bitwright"),
    Case("tvm", "mlc", "W4A16g32sym", CT),
    Case("tvm", "mlc", "W4A16g128", "bitwright"),
    Case("vllm", CT, "W4A16g128", **FLOAT16),
    Case("vllm", CT, "W4A16g128", dtype="bfloat16"),
    Case("vllm", CT, "W4A16g128sym", **FLOAT16),
    Case("vllm", CT, "W4A16g32", **FLOAT16),
    Case("vllm", CT, "W4A16", **FLOAT16),
    Case("vllm", CT, "W4A16sym", **FLOAT16),
    Case("vllm", "gptq", "W4A16g128sym", **FLOAT16),
    Case("vllm", "gptq", "W4A16g128sym", **FLOAT16, **ONE_LEFT),
    Case("vllm", "gptq", "W4A16g128sym", **FLOAT16, **OUTPUT_TOO),
    Case("vllm", "gptq", "W4A16sym", **FLOAT16),
    Case("vllm", "awq", "W4A16g128", **FLOAT16),
    Case("vllm", "awq", "W4A16g128", **FLOAT16, **ONE_LEFT),
    Case("vllm", "awq", "W4A16g128", **FLOAT16, **OUTPUT_TOO),
    Case("vllm", "awq", "W4A16g64", **FLOAT16),
    Case("vllm", "awq", "W4A16", **FLOAT16),
)


def make(case: Case, model: Path, scratch: Path) -> CaseFiles:
    """Quantize with rtn, and export if the case asks for it. Raises UserError."""
    first, output = scratch / "quantized", scratch / ("out.gguf" if case.format == "gguf" else "out")
    if case.source is None:
        first = output
    asked = case.among(case.settings.keys() - {*EXPORTING, *CLIENTS_OWN})
    how = {"model": str(model), "scheme": case.scheme, "method": "rtn", "format": case.source or case.format}
    bitwright.quantize(bitwright.Recipe.from_mapping(how | asked), first)
    if case.source is not None:
        bitwright.export(first, output, format=case.format, **case.among(EXPORTING))
    reference = QuantizedFolder.open(first)
    changed = _changed(case, reference)
    return CaseFiles(output, reference, bytes_of_weights(output), *_true_size(reference, case), changed)


def bytes_of_weights(output: Path) -> int:
    """The size in bytes of a file, or of all files with weights in a folder, their headers included."""
    files = [output] if output.is_file() else [path for kind in WEIGHT_FILES for path in output.glob(kind)]
    return sum(path.stat().st_size for path in files)


def _true_size(model: QuantizedFolder, case: Case) -> tuple[float, float]:
    """Bytes of the whole model, and bits per weight of its linears; nothing padded, nothing repeated."""
    weights = [model.read(name) for name in model.linears]
    bits, count = sum(weight.storage_bits for weight in weights), sum(weight.codes.numel() for weight in weights)
    others = float(sum(model.checkpoint.nbytes(name) for name in model.passed))
    if _quantizes_outside(case):
        plain = Q8_0_BITS if case.format == "gguf" else _bits(_preset(case))
        for name in filter(model.passed.__contains__, OUTSIDE):
            others += model.checkpoint.entry(name).elements * plain / 8 - model.checkpoint.nbytes(name)
    return bits / 8 + others, bits / count


def _changed(case: Case, model: QuantizedFolder) -> dict[str, Tensor]:
    """Embedding and output layer as a format holds them that quantizes these, too."""
    how: dict[str, Callable[[Tensor], Tensor]] = {
        "gguf": lambda weight: valued(*nearest(weight, GGMLQuantizationType.Q8_0)),
        "mlc": lambda weight: fitted_to(weight, _preset(case)).dequantize(torch.float32),
    }
    names = [name for name in OUTSIDE if name in model.passed and _quantizes_outside(case)]
    return {name: how[case.format](model.tensor(name).float()) for name in names}


def _quantizes_outside(case: Case) -> bool:
    """Whether embedding and output layer are quantized in what the client opens."""
    scheme = Scheme.parse(case.scheme)
    kept = case.settings.get("embeddings") == "f16" or (
        case.format == "mlc" and AUTOAWQ.holds(scheme.weight, scheme.tile)
    )
    return case.format in FILES and not kept


def _preset(case: Case) -> Preset:
    """MLC's preset with the bits of the case's scheme."""
    bits = Scheme.parse(case.scheme).weight.bits
    return next(preset for preset in PRESETS if preset.scheme.weight.bits == bits)


def _bits(preset: Preset) -> float:
    """The bits per weight, each weight's share of a float16 scale counted."""
    return preset.scheme.weight.bits + 16 / preset.scheme.tile.in_
