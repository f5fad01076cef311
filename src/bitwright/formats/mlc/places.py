"""Where the tensors of a model lie in MLC-LLM's folder, from what its mlc-chat-config.json says."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bitwright.core.decoder import HEAD, Decoder, OddConfigError, decoder_of
from bitwright.core.engine_file import Shape
from bitwright.formats.mlc import architectures
from bitwright.formats.mlc.chat import CONFIG
from bitwright.formats.mlc.presets import AUTOAWQ, AUTOAWQ_GROUP, EMBEDDINGS_KEPT, PRESETS, Preset

AS_THEY_ARE = ("q0f16", "q0bf16", "q0f32")
"""MLC's names for weights that are not quantized."""
DIMENSIONS = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "head_dim"),
    *("num_key_value_heads", "tie_word_embeddings", "attention_bias"),
)
"""What of a model_config tells which tensors there are, by the keys of config.json."""


@dataclass(frozen=True)
class Home:
    """Where a tensor of the folder lies: from which row of which matrix on, and its own shape."""

    name: str
    row: int
    shape: Shape


@dataclass(frozen=True)
class Places:
    """``says`` is the contents of mlc-chat-config.json."""

    says: Mapping[str, Any]

    @cached_property
    def unknown(self) -> str:
        """Why the architecture is not looked at; "" if it is."""
        if self.says.get("model_type") not in architectures.ARCHITECTURES:
            return f"model type {self.says.get('model_type')} is not known here"
        if self.quantization not in (AUTOAWQ, *AS_THEY_ARE) and self.preset is None:
            return f"quantization {self.quantization} is not known here"
        return self._decoder if isinstance(self._decoder, str) else ""

    def needed(self) -> dict[str, Shape]:
        """What the folder has to hold, by MLC's names, as it is stored."""
        found = dict[str, Shape]()
        for name, shape in self.matrices.items():
            found |= self.stored_as(name, shape)
        for home in self.homes.values():
            if len(home.shape) == 1:
                before = found.get(home.name, (0,))[0]
                found[home.name] = (max(before, home.row + home.shape[0]),)
        return found

    @cached_property
    def quantization(self) -> str:
        """MLC's name of it."""
        return str(self.says.get("quantization"))

    @cached_property
    def preset(self) -> Preset | None:
        """The preset that it names, None for another layout."""
        known = (*PRESETS, EMBEDDINGS_KEPT)
        return next((preset for preset in known if preset.name == self.quantization), None)

    @cached_property
    def _decoder(self) -> Decoder | str:
        """The decoder that the config describes; in words what it does not say."""
        settings = self.says.get("model_config") or {}
        try:
            return decoder_of({key: settings.get(key) for key in DIMENSIONS} | {"model_type": self.says["model_type"]})
        except OddConfigError as error:
            return f"{CONFIG} does not say {error.key} as one number"

    @cached_property
    def homes(self) -> dict[str, Home]:
        """Where the folder's tensors lie, by their names; empty if the architecture is unknown."""
        if self.unknown or isinstance(self._decoder, str):
            return {}
        decoder, shapes = self._decoder, self._decoder.parameters
        if architectures.shares_embedding(decoder):
            del shapes[f"{HEAD}.weight"]
        homes = {
            name: Home(name.removesuffix(".weight") if len(shape) > 1 else name, 0, shape)
            for name, shape in shapes.items()
        }
        for place in architectures.matrices(decoder):
            row = 0
            for linear in place.linears:
                shape = shapes[f"{linear}.weight"]
                homes[f"{linear}.weight"] = Home(place.name, row, shape)
                if place.bias:
                    homes[f"{linear}.bias"] = Home(f"{place.name}.bias", row, shape[:1])
                row += shape[0]
        return homes

    @cached_property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """MLC's matrices and their shapes [N, K]."""
        found = dict[str, tuple[int, int]]()
        for home in self.homes.values():
            if len(home.shape) == 2:
                rows = max(found.get(home.name, (0, 0))[0], home.row + home.shape[0])
                found[home.name] = (rows, home.shape[1])
        return found

    def stored_as(self, name: str, shape: tuple[int, int]) -> dict[str, Shape]:
        """The tensors of a matrix."""
        (rows, columns), preset = shape, self.preset
        outside = ".layers." not in name
        if self.quantization == AUTOAWQ and not outside:
            groups, words = columns // AUTOAWQ_GROUP, rows // 8
            return dict(zip(awq_leaves(name), ((columns, words), (groups, words), (groups, rows)), strict=True))
        if preset is None or (outside and not preset.embeddings):
            return {f"{name}.weight": shape}
        scales = (rows, -(-columns // preset.group))
        return {f"{name}.q_weight": (rows, preset.words(columns)), f"{name}.q_scale": scales}


def awq_leaves(name: str) -> tuple[str, str, str]:
    """Words of codes, words of zero points, scales."""
    return (f"{name}.qweight", f"{name}.qzeros", f"{name}.scales")
