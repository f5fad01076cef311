"""The places of a model's tensors in a folder of MLC-LLM, told from its mlc-chat-config.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bitwright.core.decoder import BLOCKS, HEAD, Decoder, OddConfigError, decoder_of
from bitwright.core.engine_file import Shape
from bitwright.formats.mlc import architectures
from bitwright.formats.mlc.chat import CONFIG
from bitwright.formats.mlc.presets import NAMES, Preset

AS_THEY_ARE = ("q0f16", "q0bf16", "q0f32")
"""MLC's names for weights that are not quantized."""
DIMENSIONS = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "head_dim"),
    *("num_key_value_heads", "tie_word_embeddings", "attention_bias"),
)
"""The keys of a model_config, and of config.json, that tell which tensors there are."""


@dataclass(frozen=True)
class Home:
    """The place of a tensor of the original: MLC's matrix, the first row in it, and the tensor's own shape."""

    name: str
    row: int
    shape: Shape


@dataclass(frozen=True)
class Places:
    """The places of all tensors; ``config`` is the contents of mlc-chat-config.json."""

    config: Mapping[str, Any]

    @cached_property
    def unknown(self) -> str:
        """The reason why the architecture is not looked at; "" if it is."""
        if self.config.get("model_type") not in architectures.ARCHITECTURES:
            return f"model type {self.config.get('model_type')} is not known here"
        if self.quantization not in AS_THEY_ARE and self.preset is None:
            return f"quantization {self.quantization} is not known here"
        return self._decoder if isinstance(self._decoder, str) else ""

    def needed(self) -> dict[str, Shape]:
        """The tensors that the folder has to hold, by MLC's names, in the shapes that are stored."""
        shapes = dict[str, Shape]()
        for name, shape in self.matrices.items():
            shapes |= self.stored_as(name, shape)
        for home in self.homes.values():
            if len(home.shape) == 1:
                before = shapes.get(home.name, (0,))[0]
                shapes[home.name] = (max(before, home.row + home.shape[0]),)
        return shapes

    @cached_property
    def quantization(self) -> str:
        """MLC's name of the quantization."""
        return str(self.config.get("quantization"))

    @cached_property
    def preset(self) -> Preset | None:
        """The preset of this name; None for another layout."""
        return NAMES.get(self.quantization)

    @cached_property
    def _decoder(self) -> Decoder | str:
        """The decoder that the config describes; if it describes none, the reason in words."""
        settings = self.config.get("model_config") or {}
        dimensions = {key: settings.get(key) for key in DIMENSIONS}
        try:
            return decoder_of(dimensions | {"model_type": self.config["model_type"]})
        except OddConfigError as error:
            return f"{CONFIG} does not say {error.key} as one number"

    @cached_property
    def homes(self) -> dict[str, Home]:
        """The places of the original's tensors, by their names; empty if the architecture is unknown."""
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
        shapes = dict[str, tuple[int, int]]()
        for home in self.homes.values():
            if len(home.shape) == 2:
                rows = max(shapes.get(home.name, (0, 0))[0], home.row + home.shape[0])
                shapes[home.name] = (rows, home.shape[1])
        return shapes

    def stored_as(self, name: str, shape: tuple[int, int]) -> dict[str, Shape]:
        """The tensors that a matrix is stored as."""
        if self.preset is None or not (self.preset.embeddings or is_inside(name)):
            return {f"{name}.weight": shape}
        return self.preset.stored(name, shape)


def is_inside(name: str) -> bool:
    """Whether a matrix of MLC's is one of the blocks, not embedding or output layer."""
    return name.startswith(f"{BLOCKS}.")
