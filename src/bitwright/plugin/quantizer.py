"""The quantizer that transformers uses for folders with ``"quant_method": "bitwright"``.

It is imported while transformers itself is being imported, so at the top it imports only what is loaded by then.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bitwright.plugin.dense_loading import DensePlan

NAME = "bitwright"
HOOK = "update_weight_conversions"
"""The method by which a quantizer adds conversions; releases of transformers without it cannot load experts."""


def register() -> None:
    """Make the format known to transformers, once."""
    if NAME not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(NAME)(BitwrightConfig)
        register_quantizer(NAME)(BitwrightQuantizer)


class BitwrightConfig(QuantizationConfigMixin):
    """A quantization_config as transformers passes it on; ``described`` is its checked content."""

    def __init__(self, **content: Any) -> None:
        """Parse the content of a quantization_config. Raises CheckpointError for one that cannot be read."""
        from bitwright.formats.bitwright.config import Config

        self.quant_method: Any = NAME
        self.described = Config.parse(content)

    def to_dict(self) -> dict[str, Any]:
        """The config as it stands in config.json."""
        return dict(self.described.model_dump(mode="json", exclude_defaults=True))


class BitwrightQuantizer(HfQuantizer):
    """A quantizer that packs linears before weights are loaded, dequantizes experts, and checks both afterwards.

    The weights of linears stay packed, and are saved as they were loaded. Experts become dense, so a model with experts
    cannot be saved.
    """

    requires_calibration = True
    quantization_config: BitwrightConfig
    folder: Path | None = None
    model: "PreTrainedModel | None" = None
    plan: "DensePlan | None" = None
    all_packed = True

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        from bitwright.plugin.loading import without_conversions, without_folder

        described = self.quantization_config.described
        if not checkpoint_files:
            without_folder(model, described)
        elif hasattr(HfQuantizer, HOOK):  # done later, with the conversions
            self.folder, self.model = Path(checkpoint_files[0]).parent, model
        else:
            without_conversions(model, described, Path(checkpoint_files[0]).parent)

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any, **__: Any) -> list[Any]:
        """Put our conversions before the model's; transformers calls this before it loads."""
        from bitwright.plugin.loading import with_conversions

        if self.folder is None or self.model is None:
            return weight_conversions
        described = self.quantization_config.described
        self.plan, ours = with_conversions(self.model, described, self.folder, weight_conversions)
        return [*ours, *weight_conversions]

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **_: Any) -> "PreTrainedModel":
        from bitwright.plugin.loading import check_loaded
        from bitwright.plugin.packed_model import check_values, quantize_attention_of

        if self.folder is not None:
            check_loaded(self.folder, self.plan)
            self.all_packed = self.plan is not None and not self.plan.destinations
        self.model = self.plan = None
        check_values(model)
        quantize_attention_of(model, self.quantization_config.described)
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Whether the model can be saved: not if it has experts, which are dense in memory."""
        return self.all_packed

    @property
    def is_trainable(self) -> bool:
        """Whether the model can be trained: no, because codes have no gradients."""
        return False
