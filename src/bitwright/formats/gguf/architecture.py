"""A decoder as llama.cpp's architectures ``llama``, ``qwen2`` and ``qwen3`` read it; and what they cannot compute.

Llama and Mistral are one architecture there. It rotates neighbours (0, 1), (2, 3), ... and the checkpoint rotates the
halves (0, d/2), (1, d/2 + 1), ... of a head, so rows of q and k change places (``rotated_rows``).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map
from jaxtyping import Float, Int
from torch import Tensor

from bitwright.core.decoder import QKV, Config, Decoder, OddConfigError, decoder_of
from bitwright.core.errors import RecipeError
from bitwright.formats.gguf.file import Entry, count, number, text

KNOWN = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
}
"""The ``model_type`` of models that are written, and llama.cpp's architecture for each."""
PLAIN, LINEAR, YARN, LLAMA3 = "default", "linear", "yarn", "llama3"
"""How rotary frequencies are scaled."""
YARN_TAKES = {"rope_type", "factor", "original_max_position_embeddings", "truncate"}
EMBEDDING, NORM, OUTPUT, ROPE_FACTORS = "token_embd.weight", "output_norm.weight", "output.weight", "rope_freqs.weight"
"""GGUF's names of tensors outside the blocks; rotary factors are no weights."""
BLOCK_PREFIX = "blk."


@dataclass(frozen=True)
class Architecture:
    """A decoder under its architecture of llama.cpp."""

    kind: MODEL_ARCH
    decoder: Decoder

    @property
    def name(self) -> str:
        """GGUF's name of the architecture."""
        return str(MODEL_ARCH_NAMES[self.kind])

    def entries(self) -> Iterator[Entry]:
        """Yield the metadata. Raises OddConfigError for a number that config.json leaves out."""
        decoder, rope, at = self.decoder, self.decoder.rope, self.name
        yield count(f"{at}.block_count", decoder.blocks)
        yield count(f"{at}.context_length", self.context)
        yield count(f"{at}.embedding_length", decoder.hidden)
        yield count(f"{at}.feed_forward_length", decoder.intermediate)
        yield count(f"{at}.attention.head_count", decoder.heads)
        yield count(f"{at}.attention.head_count_kv", decoder.kv_heads)
        yield count(f"{at}.attention.key_length", decoder.head_dim)
        yield count(f"{at}.attention.value_length", decoder.head_dim)
        yield number(f"{at}.attention.layer_norm_rms_epsilon", decoder.epsilon)
        yield count(f"{at}.rope.dimension_count", decoder.head_dim)
        yield number(f"{at}.rope.freq_base", rope.theta)
        yield count(f"{at}.vocab_size", decoder.vocabulary)
        if rope.kind in (LINEAR, YARN):
            yield text(f"{at}.rope.scaling.type", rope.kind)
            yield number(f"{at}.rope.scaling.factor", rope.scaling["factor"])
        if rope.kind == YARN:
            yield count(f"{at}.rope.scaling.original_context_length", self.original_context)

    @property
    def context(self) -> int:
        """The number of tokens that the model takes.

        It is no more than its attention's window if it has one: llama.cpp has no windows in these architectures, and
        computes something else beyond it.
        """
        window = self.decoder.window
        return self._positions if window is None else min(self._positions, window)

    @property
    def original_context(self) -> int:
        """The context in tokens before it was stretched."""
        return int(self.decoder.rope.original_context or self._positions)

    @property
    def _positions(self) -> int:
        if self.decoder.context is None:
            raise OddConfigError("max_position_embeddings", None)
        return self.decoder.context

    def rope_factors(self) -> Float[Tensor, " F"] | None:
        """Compute Llama 3's divisors of the rotary frequencies, in float32; None if there are none.

        Wavelengths that fit into the old context ``high_freq_factor`` times stay, those that fit ``low_freq_factor``
        times at most are divided by ``factor``, and in between the frequencies are mixed.
        """
        rope, width = self.decoder.rope, self.decoder.head_dim
        if rope.kind != LLAMA3:
            return None
        frequencies = float(rope.theta) ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        fits = self.original_context * frequencies / (2 * math.pi)
        low, high = float(rope.scaling["low_freq_factor"]), float(rope.scaling["high_freq_factor"])
        kept = ((fits - low) / (high - low)).clamp(0, 1)
        return (1 / (kept + (1 - kept) / float(rope.scaling["factor"]))).float()

    def tensor(self, name: str) -> str | None:
        """Look up GGUF's name of a tensor; None for one that these architectures have no place for."""
        named: str | None = _names(self.kind, self.decoder.blocks).get_name(name, try_suffixes=(".weight", ".bias"))
        return named

    def rotated_rows(self, name: str) -> Int[Tensor, " O"] | None:
        """The order in which the rows of q or k (a weight or a bias) are written; None if they stay as they are."""
        (q, k, _), width = QKV, self.decoder.head_dim
        rotated = {q: self.decoder.heads, k: self.decoder.kv_heads}
        heads = next((heads for linear, heads in rotated.items() if f".{linear}." in f"{name}."), None)
        if self.kind is not MODEL_ARCH.LLAMA or heads is None or width % 2:
            return None
        return torch.arange(heads * width).view(heads, 2, width // 2).transpose(1, 2).reshape(-1)


@cache
def _names(kind: MODEL_ARCH, blocks: int) -> Any:
    """The library's map of names; making it takes a while."""
    return get_tensor_name_map(kind, blocks)


def architecture(config: Config) -> Architecture:
    """Read the architecture of a config.json. Raises RecipeError for what llama.cpp would compute in another way."""
    kind = KNOWN.get(str(config.get("model_type")))
    if kind is None:
        raise RecipeError(
            f"GGUF files are written for {', '.join(KNOWN)}; config.json says model_type {config.get('model_type')!r}. "
            "Take another format for this model"
        )
    try:
        model = Architecture(kind, decoder_of(config))
        wrong = next(_wrong(model, config), None)
        if wrong is None:
            tuple(model.entries())
            model.rope_factors()
            _require_possible(model)
    except OddConfigError as error:
        raise _lacking(f"{error.key} is {error.value!r}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise _lacking(repr(error)) from None
    if wrong:
        raise RecipeError(f"llama.cpp would compute this model in another way: {wrong}. Take another format for it")
    return model


def _require_possible(model: Architecture) -> None:
    """Raise OddConfigError for numbers that llama.cpp does not compute with."""
    decoder = model.decoder
    if not 0 < decoder.epsilon < 1:
        raise OddConfigError("rms_norm_eps", decoder.epsilon)
    if model.context < 1:
        raise OddConfigError("max_position_embeddings", decoder.context)
    if decoder.heads % decoder.kv_heads:
        raise OddConfigError("num_key_value_heads", decoder.kv_heads)
    if decoder.head_dim % 2:
        raise OddConfigError("head_dim", decoder.head_dim)


def _lacking(what: str) -> RecipeError:
    return RecipeError(f"config.json lacks something that a GGUF file needs, or says it oddly: {what}")


def _wrong(model: Architecture, config: Config) -> Iterator[str]:
    """Yield what llama.cpp would compute in another way."""
    rope = model.decoder.rope
    if model.decoder.activation != "silu":
        yield f"its activation is {model.decoder.activation}, there it is silu"
    if float(rope.partial) != 1.0:
        yield "only a part of each head is rotated"
    if rope.kind not in (PLAIN, LINEAR, YARN, LLAMA3):
        yield f"its rotary embeddings are scaled as {rope.kind!r}; known are linear, yarn and llama3"
    if rope.kind == LLAMA3 and model.kind is not MODEL_ARCH.LLAMA:
        yield f"architecture {model.name} has no place for llama3's rotary factors"
    if rope.kind == YARN and (more := sorted(set(rope.scaling) - YARN_TAKES)):
        yield f"yarn with {', '.join(more)} of its own"
    if rope.kind == YARN and not rope.scaling.get("truncate", True):
        yield "yarn without rounding its corrections"
    kinds = set(config.get("layer_types") or ())
    if kinds - {"full_attention", "sliding_attention"}:
        yield f"layers of types {sorted(kinds)}"
