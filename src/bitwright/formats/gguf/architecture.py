"""What config.json says, as llama.cpp's architectures ``llama``, ``qwen2`` and ``qwen3`` read it; and what they cannot.

Llama and Mistral are one architecture there. It rotates neighbours (0, 1), (2, 3), ... where the checkpoint rotates the
halves (0, d/2), (1, d/2 + 1), ... of a head, so that rows of q and k change places (``rotated_rows``).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map
from jaxtyping import Float, Int
from torch import Tensor

from bitwright.core.errors import RecipeError
from bitwright.formats.gguf.entries import Entry, count, number, text

Config = Mapping[str, Any]
KNOWN = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
}
THETA, EPSILON = 10000.0, 1e-6
"""What transformers takes where a config says nothing."""
LINEAR, YARN, LLAMA3 = "linear", "yarn", "llama3"
PLAIN = ("default", None)
YARN_TAKES = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "truncate"}
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Architecture:
    """A model's dimensions. ``rope`` is config.json's rope_parameters, or rope_scaling."""

    kind: MODEL_ARCH
    blocks: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    vocabulary: int
    rope: Config
    config: Config

    @property
    def name(self) -> str:
        """As GGUF calls it."""
        return str(MODEL_ARCH_NAMES[self.kind])

    @property
    def rope_type(self) -> str | None:
        """How rotary embeddings are scaled."""
        found: str | None = self.rope.get("rope_type", self.rope.get("type"))
        return found

    def entries(self) -> Iterator[Entry]:
        """The metadata."""
        config, at = self.config, self.name
        yield count(f"{at}.block_count", self.blocks)
        yield count(f"{at}.context_length", self.context)
        yield count(f"{at}.embedding_length", self.hidden)
        yield count(f"{at}.feed_forward_length", config["intermediate_size"])
        yield count(f"{at}.attention.head_count", self.heads)
        yield count(f"{at}.attention.head_count_kv", self.kv_heads)
        yield count(f"{at}.attention.key_length", self.head_dim)
        yield count(f"{at}.attention.value_length", self.head_dim)
        yield number(f"{at}.attention.layer_norm_rms_epsilon", config.get("rms_norm_eps", EPSILON))
        yield count(f"{at}.rope.dimension_count", self.head_dim)
        yield number(f"{at}.rope.freq_base", self.theta)
        yield count(f"{at}.vocab_size", self.vocabulary)
        if self.rope_type in (LINEAR, YARN):
            yield text(f"{at}.rope.scaling.type", str(self.rope_type))
            yield number(f"{at}.rope.scaling.factor", self.rope["factor"])
        if self.rope_type == YARN:
            yield count(f"{at}.rope.scaling.original_context_length", self.original_context)

    @property
    def theta(self) -> float:
        """The base of the rotary frequencies."""
        return float(self.rope.get("rope_theta") or self.config.get("rope_theta") or THETA)

    @property
    def context(self) -> int:
        """How many tokens the model takes; where it attends to a window, no more than that, since llama.cpp has no
        windows in these architectures and goes another way beyond one."""
        positions = int(self.config.get("max_position_embeddings", 2048))
        return positions if self.window is None else min(positions, self.window)

    @property
    def window(self) -> int | None:
        """The tokens that attention reaches back, None for all."""
        found = self.config.get("sliding_window")
        on = self.config.get("use_sliding_window", self.config["model_type"] == "mistral")
        return int(found) if found and on else None

    @property
    def original_context(self) -> int:
        """The context before it was stretched."""
        return int(
            self.rope.get("original_max_position_embeddings")
            or self.config.get("original_max_position_embeddings")
            or self.config["max_position_embeddings"]
        )

    def rope_factors(self) -> Float[Tensor, " F"] | None:
        """Llama 3's divisors of the rotary frequencies, in float32; None where there are none.

        Wavelengths that fit into the old context ``high_freq_factor`` times stay, those that fit ``low_freq_factor``
        times at most are divided by ``factor``, and in between the frequencies are mixed.
        """
        if self.rope_type != LLAMA3:
            return None
        frequencies = self.theta ** (-torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim)
        fits = self.original_context * frequencies / (2 * math.pi)
        low, high = float(self.rope["low_freq_factor"]), float(self.rope["high_freq_factor"])
        kept = ((fits - low) / (high - low)).clamp(0, 1)
        return (1 / (kept + (1 - kept) / float(self.rope["factor"]))).float()

    def tensor(self, name: str) -> str | None:
        """GGUF's name of a tensor, None for one that these architectures have no place for."""
        found: str | None = _names(self.kind, self.blocks).get_name(name, try_suffixes=(".weight", ".bias"))
        return found

    def rotated_rows(self, name: str) -> Int[Tensor, " O"] | None:
        """In which order the rows of q or k (a weight or a bias) go; None: as they are."""
        if self.kind is not MODEL_ARCH.LLAMA or ".self_attn." not in name:
            return None
        module = name.rpartition(".self_attn.")[2].partition(".")[0]
        heads = {"q_proj": self.heads, "k_proj": self.kv_heads}.get(module)
        if heads is None or self.head_dim % 2:
            return None
        rows = torch.arange(heads * self.head_dim)
        return rows.view(heads, 2, self.head_dim // 2).transpose(1, 2).reshape(-1)


@cache
def _names(kind: MODEL_ARCH, blocks: int) -> Any:
    """The library's map of names, which takes it a while to make."""
    return get_tensor_name_map(kind, blocks)


def architecture(config: Config) -> Architecture:
    """The architecture of a config.json. Raises RecipeError for what llama.cpp would compute in another way."""
    kind = KNOWN.get(str(config.get("model_type")))
    if kind is None:
        raise RecipeError(
            f"GGUF files are written for {', '.join(KNOWN)}; config.json says model_type {config.get('model_type')!r}. "
            "Take another format for this model"
        )
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        found = Architecture(
            kind,
            blocks=int(config["num_hidden_layers"]),
            hidden=hidden,
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            tied=bool(config.get("tie_word_embeddings", False)),
            vocabulary=int(config["vocab_size"]),
            rope=config.get("rope_parameters") or config.get("rope_scaling") or {},
            config=config,
        )
        wrong = next(_wrong(found), None)
        if wrong is None:
            tuple(found.entries())
    except (KeyError, TypeError, ValueError) as error:
        raise RecipeError(f"config.json lacks something that a GGUF file needs, or says it oddly: {error!r}") from None
    if wrong:
        raise RecipeError(f"llama.cpp would compute this model in another way: {wrong}. Take another format for it")
    return found


def _wrong(model: Architecture) -> Iterator[str]:
    """What the architecture has no words for."""
    config, rope = model.config, model.rope
    if config.get("hidden_act", "silu") != "silu":
        yield f"its activation is {config['hidden_act']}, there it is silu"
    if float(rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))) != 1.0:
        yield "only a part of each head is rotated"
    if model.rope_type not in (*PLAIN, LINEAR, YARN, LLAMA3):
        yield f"its rotary embeddings are scaled as {model.rope_type!r}; known are linear, yarn and llama3"
    if model.rope_type == LLAMA3 and model.kind is not MODEL_ARCH.LLAMA:
        yield f"architecture {model.name} has no place for llama3's rotary factors"
    if model.rope_type == YARN and (more := sorted(set(rope) - YARN_TAKES)):
        yield f"yarn with {', '.join(more)} of its own"
    if model.rope_type == YARN and not rope.get("truncate", True):
        yield "yarn without rounding its corrections"
    kinds = set(config.get("layer_types") or ())
    if kinds - {"full_attention", "sliding_attention"}:
        yield f"layers of types {sorted(kinds)}"
