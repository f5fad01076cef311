"""The quantizer that transformers asks about folders with ``"quant_method": "bitwright"``.

Imported while transformers itself is being imported: at the top it may need only what is loaded by then.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

if TYPE_CHECKING:
    from torch import nn

NAME = "bitwright"


def register() -> None:
    """Makes the format known to transformers, once."""
    if NAME not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(NAME)(BitwrightConfig)
        register_quantizer(NAME)(BitwrightQuantizer)


class BitwrightConfig(QuantizationConfigMixin):
    """A quantization_config as transformers passes it on; ``described`` is what it says, checked."""

    def __init__(self, **found: Any) -> None:
        """Raises CheckpointError for a config that cannot be read."""
        from bitwright.formats.bitwright import Config

        self.quant_method: Any = NAME
        self.described = Config.parse(found)

    def to_dict(self) -> dict[str, Any]:
        """The config as it stands in config.json."""
        return dict(self.described.model_dump(mode="json"))


class BitwrightQuantizer(HfQuantizer):
    """Puts packed linears into a model before its weights are loaded, and checks them afterwards.

    Its weights stay packed; saved again, they are the same tensors.
    """

    requires_calibration = True
    quantization_config: BitwrightConfig

    def _process_model_before_weight_loading(
        self, model: "nn.Module", checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        from bitwright.plugin.packed_model import check_headers, pack_linears

        packed = pack_linears(model, self.quantization_config.described)
        if checkpoint_files:
            check_headers(packed, Path(checkpoint_files[0]).parent)

    def _process_model_after_weight_loading(self, model: "nn.Module", **_: Any) -> "nn.Module":
        from bitwright.plugin.packed_model import check_values, quantize_attention_of

        check_values(model)
        quantize_attention_of(model, self.quantization_config.described)
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Yes: the tensors in memory are those on disk."""
        return True

    @property
    def is_trainable(self) -> bool:
        """No: codes have no gradients."""
        return False
